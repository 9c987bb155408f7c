"""The cost model: what it promises is what caches hold, its front has nothing beaten on it, bits by layer add up."""

from __future__ import annotations

from typing import Literal, get_args

import pytest
import torch
from torch import Tensor

import tensornet_compress.kv as kv
from tensornet_compress.errors import TensorNetError
from tensornet_compress.kv.planning import layer_bits
from tensornet_compress.kv.profile.profile import SIDES
from tests.kv.tiny_models import VOCABULARY, tiny, tiny_profile

Mode = Literal["live", "storage"]


@pytest.fixture(scope="module")
def candidates() -> list[kv.CacheCost]:
    return kv.costs(tiny("llama-gqa"), tiny_profile("llama-gqa"), 64 * 8 + 64, (1.0, 2.0, 4.0))


@pytest.mark.parametrize(("mode", "bits"), [("live", 2.0), ("live", 4.0), ("storage", 2.0), ("storage", 4.0)])
def test_promised_bytes_are_held(candidates: list[kv.CacheCost], mode: str, bits: float) -> None:
    model, profile = tiny("llama-gqa"), tiny_profile("llama-gqa")
    ids = torch.randint(1, VOCABULARY, (1, 64 * 8 + 64), generator=torch.Generator().manual_seed(5))
    cache = kv.CompressedCache(model, bits=bits, profile=profile, mode=mode, block=64)
    with torch.no_grad():
        model(ids, past_key_values=cache)
    if mode == "storage":
        cache.freeze()
    promised = next(c for c in candidates if c.mode == mode and c.bits == bits)
    assert cache.nbytes == pytest.approx(promised.held_nbytes, rel=0.1)


def test_more_bits_cost_bytes_and_save_error(candidates: list[kv.CacheCost]) -> None:
    for mode in ("live", "storage"):
        rows = sorted((c for c in candidates if c.mode == mode and c.attention != "rebuild"), key=lambda c: c.bits)
        assert [c.held_nbytes for c in rows] == sorted(c.held_nbytes for c in rows)
        assert [c.error for c in rows] == sorted((c.error for c in rows), reverse=True)


def test_the_front_has_every_extreme_and_nothing_beaten(candidates: list[kv.CacheCost]) -> None:
    kept = kv.front(candidates)
    assert min(candidates, key=lambda c: c.held_nbytes).held_nbytes == min(c.held_nbytes for c in kept)
    assert min(c.error for c in kept) == 0.0
    for a in kept:
        for b in kept:
            dearer = (a.held_nbytes, a.working_nbytes, a.step_multiply_adds, a.thaw_multiply_adds, a.error)
            cheaper = (b.held_nbytes, b.working_nbytes, b.step_multiply_adds, b.thaw_multiply_adds, b.error)
            assert dearer == cheaper or any(x < y for x, y in zip(dearer, cheaper))


def test_predicted_error_is_that_of_the_code() -> None:
    profile = tiny_profile("llama-gqa")
    model = tiny("llama-gqa")
    ids = torch.randint(1, VOCABULARY, (1, 400), generator=torch.Generator().manual_seed(6))
    states = _plain_states(model, ids)
    predicted = next(c.error for c in kv.costs(model, profile, 400, (3.0,)) if c.mode == "storage")
    from tensornet_compress.kv.profile.tree import rows_of
    from tensornet_compress.kv.storage.codec import JointCodec

    codec = JointCodec(profile, 3.0, rate_control=False)
    decoded = codec.decode(codec.encode(*states))
    total = 0.0
    for side, exact, got in zip(("key", "value"), states, decoded):
        tree = profile.trees[side]
        total += float((tree.analyse(rows_of(exact)) - tree.analyse(rows_of(got))).square().sum())
    measured = total / (len(rows_of(states[0])) * profile.elements_per_token)
    assert measured == pytest.approx(predicted, rel=0.5)


def _plain_states(model: torch.nn.Module, ids: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    from tensornet_compress.kv.profile.capture import Runner

    with torch.no_grad(), Runner(model) as runner:
        cache, positions = runner.prefill(ids, torch.ones_like(ids))
        keys = [runner.plain(layer.keys, positions)[0, :, 4:] for layer in cache.layers]
        return keys, [layer.values[0, :, 4:] for layer in cache.layers]


def test_too_few_tokens_are_named() -> None:
    with pytest.raises(TensorNetError, match="60 tokens leave nothing to compress"):
        kv.costs(tiny("llama-gqa"), tiny_profile("llama-gqa"), 60)


@pytest.mark.parametrize("mode", get_args(Mode))
@pytest.mark.parametrize("bits", [1.5, 4.0])
def test_bits_of_layers_average_to_the_rate(mode: Mode, bits: float) -> None:
    profile = tiny_profile("llama-gqa")
    shares = layer_bits(profile, bits, mode)
    assert [layer for layer, _, _ in shares] == profile.spec.layers
    elements = [heads * profile.spec.key.width for heads in profile.spec.heads]
    spent = sum((keys + values) * count for (_, keys, values), count in zip(shares, elements))
    if mode == "storage":
        expected = sum(profile.quantiser.expected_bits(profile.scale[side], profile.step(bits)) for side in SIDES)
    else:
        expected = sum(code.layout.bits_per_token for pair in profile.live_codes(bits) for code in pair)
    assert spent == pytest.approx(expected, rel=1e-4)
    assert spent / profile.elements_per_token == pytest.approx(bits, rel=0.1)
