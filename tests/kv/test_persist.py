"""A saved cache continues as the one in memory does; damaged or foreign files are refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import tensornet_compress as tnc
import tensornet_compress.kv as kv
from tensornet_compress.errors import CheckpointError, TensorNetError
from tensornet_compress.kv.files import weights_fingerprint
from tests.kv.tiny_models import tiny, tiny_profile


def filled(model: Any, profile: kv.Profile | None, mode: str, ids: Tensor) -> kv.CompressedCache:
    """A cache of 180 tokens, the first row padded."""
    mask = torch.ones(2, 180, dtype=torch.int64)
    mask[0, :5] = 0
    cache = kv.CompressedCache(model, bits=3.0, profile=profile, mode=mode, block=64)
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    with torch.no_grad():
        model(torch.cat([ids, ids], 1), attention_mask=mask, position_ids=positions, past_key_values=cache)
    return cache


@pytest.mark.parametrize("calibrated", [True, False])
@pytest.mark.parametrize("mode", ["storage", "live"])
@pytest.mark.parametrize("name", ["llama-gqa", "gemma3-hybrid", "gpt2"])
def test_loaded_cache_continues_alike(name: str, mode: str, calibrated: bool, ids: Tensor, tmp_path: Path) -> None:
    model = tiny(name)
    profile = tiny_profile(name) if calibrated else None
    cache = filled(model, profile, mode, ids)
    size = cache.save(tmp_path / "cache.safetensors")
    loaded = kv.CompressedCache.load(tmp_path / "cache.safetensors", model, profile)
    assert loaded.get_seq_length() == 180
    report = cache.report()
    assert abs(size - (report.nbytes - report.working_nbytes)) < 16_000
    following = torch.cat([ids[:, :80]], 1)
    positions = torch.arange(175, 255).expand(2, -1) + torch.tensor([[0], [5]])
    with torch.no_grad():
        got, wanted = (model(following, past_key_values=c, position_ids=positions).logits for c in (loaded, cache))
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-4)


def test_foreign_and_damaged_files_are_refused(ids: Tensor, tmp_path: Path) -> None:
    model, profile = tiny("llama-gqa"), tiny_profile("llama-gqa")
    path = tmp_path / "cache.safetensors"
    filled(model, profile, "storage", ids).save(path)
    with pytest.raises(CheckpointError, match="pass that one"):
        kv.CompressedCache.load(path, model)
    with pytest.raises(CheckpointError, match="pass that one"):
        kv.CompressedCache.load(path, model, tiny_profile("qwen3"))
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight.mul_(1.1)
    with pytest.raises(CheckpointError, match="other weights"):
        kv.CompressedCache.load(path, other, profile)
    for same in (kv.CompressedCache.load(path, other, profile, verify=False), kv.CompressedCache.load(path, model, profile)):
        assert same.get_seq_length() == 180
    whole = path.read_bytes()
    path.write_bytes(whole[:-50])
    with pytest.raises(CheckpointError, match="cannot be read"):
        kv.CompressedCache.load(path, model, profile)
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match="holds no cache"):
        kv.CompressedCache.load(path, model, profile)
    with pytest.raises(TensorNetError, match="empty"):
        kv.CompressedCache(model, profile=profile).save(path)


def test_weights_are_known_again_in_any_precision_and_compressed_ones_are_others(tmp_path: Path) -> None:
    model = copy.deepcopy(tiny("llama-gqa")).bfloat16()
    whole = weights_fingerprint(model)
    assert weights_fingerprint(copy.deepcopy(model).float()) == whole
    assert weights_fingerprint(torch.compile(model, backend="eager")) == whole  # type: ignore[arg-type]
    found = {whole}
    for bits in (5.0, 6.0):
        compressed = copy.deepcopy(model)
        report = tnc.compress(compressed, tnc.Budget(bits_per_weight=bits), allocator="energy")
        found.add(weights_fingerprint(compressed))
        tnc.save(compressed, tmp_path / str(bits), report=report)
    again = tnc.load(tmp_path / "5.0", copy.deepcopy(model))
    assert len(found) == 3
    assert weights_fingerprint(again) in found - {whole}
