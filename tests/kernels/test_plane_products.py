"""Products with packed fields: what unpacking them first gives, for any rows, chunks and threads."""

from __future__ import annotations

import pytest
import torch

from tensornet_compress.coding.planes import PlaneLayout, Planes
from tensornet_compress.kernels.plane_products import planes_times, times_planes


@pytest.mark.parametrize("bits", [(0, 1, 2, 3, 4, 5, 6, 8), (4, 4), (1,), (0, 0, 2), (0,)])
@pytest.mark.parametrize("rows", [1, 3, 9, 30])
@pytest.mark.parametrize("units", [(1,), (2, 1), (9, 16, 3)])
def test_agree_with_unpacked_fields(bits: tuple[int, ...], rows: int, units: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    layout, tokens = PlaneLayout.of(torch.tensor(bits)), 64 * sum(units)
    codes = torch.stack([torch.randint(0, 1 << b, (2, tokens), generator=generator) for b in bits], -1)
    planes = Planes(tuple(layout.pack(part) for part in codes.split([64 * count for count in units], 1)))
    fields = layout.unpack(layout.pack(codes)).double()
    factors, weights = (
        torch.randn(2, rows, layout.count, generator=generator),
        torch.randn(2, rows, tokens, generator=generator),
    )
    torch.testing.assert_close(times_planes(factors, layout, planes).double(), factors.double() @ fields, atol=1e-4, rtol=1e-4)
    found = planes_times(layout, planes, weights).double()
    torch.testing.assert_close(found, weights.double() @ fields.mT, atol=2e-3, rtol=1e-4)


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_share_the_work(threads: int) -> None:
    layout = PlaneLayout.of(torch.tensor([4, 2, 3, 1] * 20))
    codes = torch.randint(0, 2, (1, 64 * 33, 80), generator=torch.Generator().manual_seed(0))
    planes, factors = Planes.of(layout.pack(codes)), torch.randn(1, 12, layout.count)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        scores = times_planes(factors, layout, planes)
        sums = planes_times(layout, planes, scores)
    finally:
        torch.set_num_threads(before)
    fields = layout.unpack(layout.pack(codes)).double()
    torch.testing.assert_close(scores.double(), factors.double() @ fields, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(sums.double(), scores.double() @ fields.mT, atol=1e-1, rtol=1e-4)
