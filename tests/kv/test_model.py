"""The whole way on the embedded real model: calibrate a little, cache, generate, save, load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache

import tensornet_compress.kv as kv
from tensornet_compress.inputs import calibration_windows, heldout_windows, load_causal_lm, load_tokenizer

pytestmark = pytest.mark.model


@pytest.fixture(scope="module")
def setting() -> tuple[Any, kv.Profile, torch.Tensor]:
    """SmolLM2-135M, a small profile, and one held-out window of 448 tokens."""
    tokenizer = load_tokenizer("smollm2-135m")
    model = load_causal_lm("smollm2-135m", torch.float32)
    windows = calibration_windows(tokenizer, 320, 10)
    profile = kv.calibrate(model, windows.split(1), sensitivity_windows=4, draws=1, group_size=6, joined=0, search=False)
    return model, profile, heldout_windows(tokenizer, 448, 1)


@torch.no_grad()
def read_on(model: Any, past: Any, ids: torch.Tensor) -> torch.Tensor:
    """Log-probabilities of the last 48 tokens, read after the others were cached."""
    model(ids[:, :400], past_key_values=past, logits_to_keep=1)
    return model(ids[:, 400:], past_key_values=past).logits[0].log_softmax(-1)


def test_quality_rises_with_bits_and_bytes_fall(setting: tuple[Any, kv.Profile, torch.Tensor]) -> None:
    model, profile, ids = setting
    exact = read_on(model, DynamicCache(config=model.config), ids)
    for mode in ("storage", "live"):
        divergence = {}
        for bits in (2.0, 4.0):
            cache = kv.CompressedCache(model, bits=bits, profile=profile, mode=mode, block=64)
            got = read_on(model, cache, ids)
            divergence[bits] = float((exact.exp() * (exact - got)).sum(-1).mean())
            report = cache.report()
            sealed = report.sealed_tokens - (4 if mode == "storage" else 0)
            assert 8 * report.payload_nbytes / (sealed * profile.elements_per_token) < 1.08 * bits
            assert (report.nbytes - report.working_nbytes) / report.exact_nbytes < 0.42
        assert divergence[4.0] < 0.02
        assert divergence[4.0] < divergence[2.0] < 0.5


def test_generation_saving_and_going_on(setting: tuple[Any, kv.Profile, torch.Tensor], tmp_path: Path) -> None:
    model, profile, ids = setting
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    with kv.compressed(model, bits=4.0, profile=profile, mode="storage", block=64) as caches:
        first = model.generate(ids, **options)
    assert caches[0].report().working_nbytes == 0
    caches[0].save(tmp_path / "cache.safetensors")
    loaded = kv.CompressedCache.load(tmp_path / "cache.safetensors", model, profile)
    following = torch.cat([first, ids[:, :20]], 1)
    again = [model.generate(following, past_key_values=cache, **options) for cache in (loaded, caches[0])]
    assert torch.equal(again[0], again[1])
