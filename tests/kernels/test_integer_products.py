"""Integer products of codes: what fp64 gives, to the precision of fp32."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tensornet_compress.coding.planes import PlaneLayout, Planes
from tensornet_compress.kernels.integer_products import codes_times, planes_times, three_bytes, times_codes, times_planes


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 5), st.integers(1, 300), st.sampled_from([1e-30, 1e-6, 1.0, 1e9]), st.integers(0, 99))
def test_three_bytes_hold_24_bits(rows: int, count: int, size: float, seed: int) -> None:
    values = torch.randn(rows, count, generator=torch.Generator().manual_seed(seed)) * size
    parts, scale = three_bytes(values)
    low, middle, high = parts.double().chunk(3)
    back = ((high * 256 + middle) * 256 + low) * scale
    assert bool(((back - values).abs() <= values.abs().amax(-1, keepdim=True) * 2**-22).all())


@pytest.mark.parametrize("integers", [True, False])
@pytest.mark.parametrize("tokens", [64, 4096])
def test_products_agree_with_double_precision(integers: bool, tokens: int) -> None:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (2, 70, tokens), generator=generator, dtype=torch.uint8)
    factors = torch.randn(2, 9, 70, generator=generator) * torch.logspace(-3, 1, 70)
    weights = (torch.randn(2, 9, tokens, generator=generator) * 6).softmax(-1)
    scores = times_codes(factors, codes, integers)
    wanted = factors.double() @ codes.double()
    assert float((scores - wanted).norm() / wanted.norm()) < 1e-6
    values = codes_times(codes, weights, integers)
    wanted = weights.double() @ codes.double().mT
    assert float((values - wanted).norm() / wanted.norm()) < 1e-5


def test_rows_of_zeros_stay_zero() -> None:
    codes = torch.full((1, 4, 64), 15, dtype=torch.uint8)
    assert torch.equal(times_codes(torch.zeros(1, 3, 4), codes, True), torch.zeros(1, 3, 64))


def test_products_with_planes_go_over_all_chunks() -> None:
    generator = torch.Generator().manual_seed(0)
    bits = torch.tensor([0, 1, 2, 3, 4, 5, 6, 8])
    layout = PlaneLayout.of(bits)
    codes = torch.stack([torch.randint(0, 1 << int(b), (2, 192), generator=generator) for b in bits], -1)
    planes = Planes((layout.pack(codes[:, :64]), layout.pack(codes[:, 64:])))
    fields = layout.unpack(layout.pack(codes)).float()
    factors, weights = torch.randn(2, 3, layout.count), torch.randn(2, 3, 192)
    torch.testing.assert_close(times_planes(factors, layout, planes), factors @ fields)
    torch.testing.assert_close(planes_times(layout, planes, weights), weights @ fields.mT)
