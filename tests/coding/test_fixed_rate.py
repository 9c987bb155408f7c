"""Whole bits for each component: never more than asked, and most where most is to be lost."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tensornet_compress.coding.fixed_rate import ALLOWED, Curve, allocate


@settings(deadline=None, max_examples=40)
@given(st.floats(0.1, 8.0), st.integers(1, 60), st.integers(0, 99))
def test_allocation_never_exceeds_and_fills(bits: float, count: int, seed: int) -> None:
    deviation = torch.rand(count, generator=torch.Generator().manual_seed(seed)) * 4 + 1e-3
    curve = Curve.measure(torch.randn(4000, generator=torch.Generator().manual_seed(0)))
    chosen = allocate(deviation, curve, bits)
    assert set(chosen.tolist()) <= set(ALLOWED)
    assert float(chosen.sum()) <= bits * count
    if count > 20:
        assert float(chosen.double().mean()) > bits - 0.15


def test_more_deviation_never_gets_fewer_bits() -> None:
    curve = Curve.measure(torch.randn(20_000, generator=torch.Generator().manual_seed(0)))
    chosen = allocate(torch.logspace(2, -2, 64), curve, 2.0)
    assert (chosen.diff() <= 0).float().mean() > 0.95
