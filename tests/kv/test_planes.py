"""Bit planes: a bijection of codes, at exactly the bytes promised."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tensornet_compress.errors import TensorNetError
from tensornet_compress.kv.planes import FIELDS, UNIT, PlaneLayout, append, packed_nbytes, select


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
    fields = layout.unpack(packed, 0, units, torch.float32).long()
    restored = torch.zeros_like(codes).transpose(1, 2)
    restored.index_add_(1, layout.component, fields << layout.place[:, None])
    assert torch.equal(restored.transpose(1, 2), codes)
    assert 8 * packed_nbytes(packed) == batch * units * UNIT * sum(bits) == batch * units * UNIT * layout.bits_per_token


def test_append_and_select_keep_order() -> None:
    layout = PlaneLayout.of(torch.tensor([3, 1, 8, 0, 5]))
    codes = (torch.rand(2, 3 * UNIT, 5) * torch.tensor([8, 2, 256, 1, 32])).long()
    whole = layout.pack(codes)
    grown = append(layout.pack(codes[:, :UNIT]), layout.pack(codes[:, UNIT:]))
    for width, part in whole.items():
        assert torch.equal(grown[width], part)
        assert torch.equal(select(whole, torch.tensor([1, 1, 0]))[width], part[[1, 1, 0]])
    middle = layout.unpack(whole, 1, 2, torch.float32)
    assert torch.equal(middle, layout.unpack(whole, 0, 3, torch.float32)[:, :, UNIT : 2 * UNIT])


def test_impossible_requests_are_refused() -> None:
    with pytest.raises(TensorNetError, match="7 bits"):
        PlaneLayout.of(torch.tensor([7]))
    with pytest.raises(TensorNetError, match="multiples of 64"):
        PlaneLayout.of(torch.tensor([2])).pack(torch.zeros(1, 65, 1, dtype=torch.int64))
