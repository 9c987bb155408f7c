"""Entry sorts: what they lose and what they cost."""

from __future__ import annotations

import pytest
import torch

from tensornet_compress.errors import TensorNetError
from tensornet_compress.searching.entries import entropy_coded, sort_entries


@pytest.mark.parametrize(
    ("options", "bits"),
    [
        ({"kind": "row"}, 10.56),
        ({"kind": "block", "size": 8}, 2.0),
        ({"kind": "block", "size": 16}, 2.81),
        ({"kind": "block", "size": 32}, 3.69),
        ({"kind": "block", "size": 64}, 4.625),
        ({"kind": "row", "groups": 8}, 2.99),
    ],
)
def test_prices_are_those_of_packed_permutations(options, bits):
    fit = sort_entries(torch.randn(2, 4096, generator=torch.Generator().manual_seed(0)), **options)
    assert fit.order_bits / (2 * 4096) == pytest.approx(bits, abs=0.01)


def test_sorted_uniform_entries_are_nearly_of_rank_two():
    matrix = torch.rand(128, 128, generator=torch.Generator().manual_seed(0))
    fit = sort_entries(matrix, "global", rank=2)
    assert float((fit.dense - matrix).norm() / matrix.norm()) < 0.01
    assert fit.nbytes > 128 * 128 * 11 / 8


@pytest.mark.parametrize("kind", ["global", "row", "block"])
@pytest.mark.parametrize("nonnegative", [False, True])
def test_full_rank_gives_the_matrix_back(kind, nonnegative):
    matrix = torch.randn(12, 16, generator=torch.Generator().manual_seed(1))
    fit = sort_entries(matrix, kind, size=4, rank=16, nonnegative=nonnegative)
    assert torch.allclose(fit.dense, matrix, atol=5e-3)
    assert fit.sign_bits == (12 * 16 if nonnegative else 0)


def test_more_groups_lose_less_and_cost_more():
    matrix = torch.randn(64, 256, generator=torch.Generator().manual_seed(2))
    fits = [sort_entries(matrix, "row", groups=groups) for groups in (2, 4, 8, 16)]
    errors = [float((fit.dense - matrix).norm()) for fit in fits]
    assert errors == sorted(errors, reverse=True)
    assert [fit.nbytes for fit in fits] == sorted(fit.nbytes for fit in fits)


def test_an_entropy_coder_charges_entropy_and_its_table():
    matrix = torch.tensor([[0.0, 0.0, 0.0, 1.0]] * 8)
    dense, bits = entropy_coded(matrix, 1.0)
    assert torch.equal(dense, matrix)
    assert bits == 26 + 3 * 32  # 32 entries of 0.8113 bits, two counts and the step


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "rows"}, "unknown kind 'rows'"),
        ({"kind": "block", "size": 5}, "blocks of 5"),
        ({"kind": "row", "groups": 3}, "3 groups do not divide"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(TensorNetError, match=message):
        sort_entries(torch.randn(4, 16), **options)
    with pytest.raises(TensorNetError, match="take a matrix"):
        sort_entries(torch.randn(4, 4, 4))
