"""Calibration gives what it says, leaves the model alone, and its files are complete or refused."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import tensornet_compress.kv as kv
from tensornet_compress.errors import CheckpointError, TensorNetError
from tensornet_compress.kv.storage.codec import JointCodec
from tests.kv.tiny_models import FAMILIES, VOCABULARY, tiny, tiny_profile


def states(profile: kv.Profile, seed: int, tokens: int = 200) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Plain states drawn from a profile's own Gaussian model."""
    generator = torch.Generator().manual_seed(seed)
    out = []
    for tree, scale in ((profile.trees[side], profile.scale[side]) for side in ("key", "value")):
        rows = tree.synthesise(torch.randn(tokens, tree.components, generator=generator) * scale * 1.2533)
        out.append(list(rows.view(tokens, -1, tree.width).permute(1, 0, 2).split(profile.spec.heads, 0)))
    return out[0], out[1]


@pytest.mark.parametrize("name", FAMILIES)
def test_saved_profile_loads_equal(name: str, tmp_path: Path) -> None:
    profile = tiny_profile(name)
    profile.save(tmp_path)
    loaded = kv.Profile.load(tmp_path)
    assert loaded.spec == profile.spec
    assert loaded.fingerprint() == profile.fingerprint()
    assert (tmp_path / "profile.safetensors").stat().st_size - profile.nbytes < 20_000
    assert sorted(p.name for p in tmp_path.iterdir()) == ["profile.json", "profile.safetensors"]


@pytest.mark.parametrize("metric", ["fisher", "euclidean"])
def test_calibration_is_deterministic_and_leaves_the_model(metric: str) -> None:
    model = tiny("llama-gqa").train()
    wanted = [p.requires_grad for p in model.parameters()]
    batches = [torch.randint(1, VOCABULARY, (1, 96), generator=torch.Generator().manual_seed(i)) for i in range(6)]
    options = {"metric": metric, "group_size": 3, "joined": 4, "sensitivity_windows": 2}
    first, second = (kv.calibrate(model, batches, **options) for _ in range(2))
    assert first.fingerprint() == second.fingerprint()
    assert model.training
    assert [p.requires_grad for p in model.parameters()] == wanted
    assert all(p.grad is None for p in model.parameters())
    model.eval()


def test_padding_plays_no_part() -> None:
    model = tiny("llama-gqa")
    plain = [torch.randint(1, VOCABULARY, (1, 96), generator=torch.Generator().manual_seed(i)) for i in range(6)]
    padded = [
        {
            "input_ids": torch.cat([torch.zeros(1, 9, dtype=torch.int64), ids], 1),
            "attention_mask": torch.cat([torch.zeros(1, 9, dtype=torch.int64), torch.ones_like(ids)], 1),
        }
        for ids in plain
    ]
    options = {"metric": "euclidean", "group_size": 3, "joined": 4}
    first, second = (kv.calibrate(model, batches, **options) for batches in (plain, padded))
    for side in ("key", "value"):
        torch.testing.assert_close(first.trees[side].mean, second.trees[side].mean, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(first.scale[side], second.scale[side], atol=1e-4, rtol=2e-2)


@pytest.mark.parametrize("bits", [1.0, 2.0, 4.0])
def test_rate_control_meets_the_target(bits: float) -> None:
    profile = tiny_profile("llama-gqa")
    codec = JointCodec(profile, bits)
    keys, values = states(profile, 0)
    payload = codec.encode([3 * k for k in keys], values)
    spent = 8 * payload.nbytes / sum(t.numel() for t in (*keys, *values))
    assert 0.93 * bits < spent < 1.03 * bits


def test_calibrated_rate_is_right_on_the_calibrated_law() -> None:
    profile = tiny_profile("llama-gqa")
    keys, values = states(profile, 1, 600)
    payload = JointCodec(profile, 2.0, rate_control=False).encode(keys, values)
    assert 8 * payload.nbytes / sum(t.numel() for t in (*keys, *values)) == pytest.approx(2.0, rel=0.08)


def test_error_falls_six_decibels_a_bit() -> None:
    profile = tiny_profile("llama-gqa")
    keys, values = states(profile, 2)
    tree = profile.trees["value"]
    exact = tree.analyse(torch.cat(values).permute(1, 0, 2).flatten(1))
    error = []
    for bits in (3.0, 4.0, 5.0):
        codec = JointCodec(profile, bits)
        decoded = codec.decode(codec.encode(keys, values))[1]
        error.append((tree.analyse(torch.cat(decoded).permute(1, 0, 2).flatten(1)) - exact).square().mean().log10().item() * 10)
    assert all(4.5 < a - b < 7.5 for a, b in pairwise(error))


@pytest.mark.parametrize("damage", ["version", "missing", "extra", "shape", "truncated", "json"])
def test_damaged_profiles_are_refused(damage: str, tmp_path: Path) -> None:
    tiny_profile("llama-gqa").save(tmp_path)
    tensors, spec = tmp_path / "profile.safetensors", tmp_path / "profile.json"
    stored = load_file(tensors)
    if damage == "version":
        spec.write_text(json.dumps({**json.loads(spec.read_text()), "version": 99}))
    elif damage == "json":
        spec.write_text("{")
    elif damage == "truncated":
        tensors.write_bytes(tensors.read_bytes()[:-100])
    else:
        if damage == "missing":
            stored.pop("key.mean")
        elif damage == "extra":
            stored["more"] = torch.zeros(1)
        else:
            stored["value.group0.codes"] = stored["value.group0.codes"][:-1].clone()
        save_file(stored, tensors)
    with pytest.raises(CheckpointError):
        kv.Profile.load(tmp_path)


def test_useless_calibration_is_refused() -> None:
    model = tiny("llama-gqa")
    with pytest.raises(TensorNetError, match="no batches"):
        kv.calibrate(model, [])
    with pytest.raises(TensorNetError, match="at least 5"):
        kv.calibrate(model, [torch.ones(1, 64, dtype=torch.int64)], metric="euclidean")
    with pytest.raises(TensorNetError, match="integer input_ids"):
        kv.calibrate(model, [torch.zeros(3)])
    with pytest.raises(TensorNetError, match=r"0\.01 bits"):
        JointCodec(tiny_profile("llama-gqa"), 0.01)
