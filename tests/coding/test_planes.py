"""Bit planes: a bijection of codes, at exactly the bytes promised."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tensornet_compress.coding.planes import CLOSED, FIELDS, OPEN, UNIT, PlaneLayout, Planes
from tensornet_compress.errors import TensorNetError


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.sampled_from(sorted(FIELDS)), min_size=1, max_size=20), st.integers(1, 3), st.integers(1, 3), st.integers(0, 99)
)
def test_fields_sum_to_the_code(bits: list[int], units: int, batch: int, seed: int) -> None:
    counts = torch.tensor(bits)
    layout = PlaneLayout.of(counts)
    generator = torch.Generator().manual_seed(seed)
    codes = (torch.rand(batch, units * UNIT, len(bits), generator=generator) * (1 << counts)).long()
    packed = layout.pack(codes)
    fields = layout.unpack(packed).long()
    restored = torch.zeros_like(codes).transpose(1, 2)
    restored.index_add_(1, layout.component, fields << layout.place[:, None])
    assert torch.equal(restored.transpose(1, 2), codes)
    assert 8 * Planes.of(packed).nbytes == batch * units * UNIT * sum(bits) == batch * units * UNIT * layout.bits_per_token


@settings(deadline=None, max_examples=20)
@given(st.lists(st.sampled_from([1, 2, OPEN - 1, OPEN, OPEN + 3, CLOSED, 2 * CLOSED + 5]), min_size=1, max_size=8))
def test_planes_grow_in_order_and_stay_in_few_chunks(parts: list[int]) -> None:
    layout = PlaneLayout.of(torch.tensor([3, 1, 8, 0, 5]))
    total = sum(parts)
    codes = (torch.rand(2, total * UNIT, 5) * torch.tensor([8, 2, 256, 1, 32])).long()
    whole = layout.pack(codes)
    grown, done = Planes(()), 0
    for part in parts:
        grown = grown.append(layout.pack(codes[:, done * UNIT : (done + part) * UNIT]))
        done += part
    for width, expected in whole.items():
        assert torch.equal(grown.whole()[width], expected)
        assert torch.equal(grown.select(torch.tensor([1, 1, 0])).whole()[width], expected[[1, 1, 0]])
        assert torch.equal(grown.first(1).whole()[width], expected[:, :, :1])
    assert len(grown.chunks) <= len(parts) * (2 + CLOSED // OPEN) + total // CLOSED
    assert torch.equal(torch.cat([layout.unpack(c) for c in grown.chunks], 2), layout.unpack(whole))


def test_appending_one_unit_copies_a_bounded_number_of_bytes() -> None:
    layout = PlaneLayout.of(torch.tensor([4, 2]))
    unit = layout.pack(torch.zeros(1, UNIT, 2, dtype=torch.int64))
    grown, copied = Planes(()), []
    for _ in range(3 * CLOSED):
        kept = {id(part) for chunk in grown.chunks for part in chunk.values()}
        grown = grown.append(unit)
        copied.append(sum(part.nbytes for chunk in grown.chunks for part in chunk.values() if id(part) not in kept))
    size = Planes.of(unit).nbytes
    assert max(copied) <= CLOSED * size
    assert sum(copied[-CLOSED:]) / CLOSED <= OPEN * size
    assert len(grown.chunks) == 3


def test_impossible_requests_are_refused() -> None:
    with pytest.raises(TensorNetError, match="7 bits"):
        PlaneLayout.of(torch.tensor([7]))
    with pytest.raises(TensorNetError, match="multiples of 64"):
        PlaneLayout.of(torch.tensor([2])).pack(torch.zeros(1, 65, 1, dtype=torch.int64))
