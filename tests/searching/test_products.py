"""Outer products are found from samples, and spectra of the whole are products of those of the parts."""

from __future__ import annotations

import pytest
import torch

from tensornet_compress.searching import SpectrumStore
from tensornet_compress.searching.products import product_cut, rank_one_parts


def product(order: tuple[int, ...], dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(3, 4, 5, generator=generator, dtype=dtype), torch.randn(4, 3, generator=generator, dtype=dtype)]
    return torch.einsum("abc,de->abcde", *parts).permute(order).contiguous()


@pytest.mark.parametrize("order", [(0, 1, 2, 3, 4), (3, 0, 4, 2, 1), (4, 2, 0, 1, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_parts_of_a_product_are_found(order, dtype):
    tensor = product(order, dtype)
    found = product_cut(tensor)
    assert found is not None
    inside, column, row = found
    assert {order[mode] for mode in inside} in ({0, 1, 2}, {3, 4})
    assert column.numel() * row.numel() == tensor.numel()


@pytest.mark.parametrize("tensor", [torch.randn(4, 5, 6), torch.zeros(3, 3, 3), torch.eye(16).reshape(4, 4, 16)])
def test_what_is_no_product_has_none(tensor):
    assert product_cut(tensor) is None


def test_samples_alone_do_not_decide():
    tensor = torch.ones(40, 40, dtype=torch.float64)
    tensor[7, 9] = 2.0
    assert product_cut(tensor) is None


@pytest.mark.parametrize("left", [{0}, {1, 3}, {0, 2}, {0, 1, 4}, {2, 4}])
def test_spectra_of_a_product_are_those_of_the_whole(left):
    tensor = product((3, 0, 4, 2, 1))
    rest = [mode for mode in range(5) if mode not in left]
    rows = torch.Size([tensor.shape[m] for m in sorted(left)]).numel()
    expected = torch.linalg.svdvals(tensor.permute(*sorted(left), *rest).reshape(rows, -1))
    found = SpectrumStore(tensor).spectrum(left)
    assert torch.allclose(found, expected[: len(found)], atol=1e-6)
    assert float(expected[len(found) :].square().sum()) <= 1e-12 * float(expected.square().sum())


def test_a_cut_of_rank_one_that_samples_miss_splits_the_store():
    first, second = torch.zeros(30, 30, dtype=torch.float64), torch.zeros(30, 30, dtype=torch.float64)
    first[3, 4] = first[5, 6] = second[1, 2] = second[7, 9] = 1.0
    store = SpectrumStore(torch.einsum("ab,cd->abcd", first, second))
    assert store.rank({0, 1}, 1e-9) == 1
    assert torch.allclose(store.spectrum({0})[:2], torch.tensor([2.0, 2.0], dtype=torch.float64).sqrt(), atol=1e-6)
    assert store.rank({0, 2}, 1e-9) == 4


def test_large_products_in_single_precision_are_found():
    """Their dot products are long: summed in single precision they would err by more than what a product may be off."""
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(10, 10, generator=generator) for _ in range(3)]
    tensor = torch.einsum("ab,cd,ef->acebdf", *parts).contiguous()
    for _ in range(2):
        found = product_cut(tensor)
        assert found is not None
        inside, _, row = found
        assert len(inside) == 2
        assert inside[1] == inside[0] + tensor.ndim // 2
        tensor = row.reshape([10] * (tensor.ndim - 2))
    assert product_cut(tensor) is None


def test_rank_one_parts_give_the_matrix_back():
    matrix = torch.outer(torch.randn(5), torch.randn(7))
    column, row = rank_one_parts(matrix)
    assert torch.allclose(torch.outer(column, row), matrix, atol=1e-6)
