"""Bits by layer add up to what the cache spends."""

from __future__ import annotations

from typing import Literal

import pytest

from tensornet_compress.kv.profile.profile import SIDES
from tensornet_compress.kv.planning import layer_bits
from tests.kv.tiny_models import tiny_profile

Mode = Literal["live", "storage"]
MODES: tuple[Mode, ...] = ("live", "storage")


@pytest.mark.parametrize("mode", MODES)
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
