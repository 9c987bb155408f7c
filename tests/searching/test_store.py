"""Outer products are found from samples, and spectra of the whole are products of those of the parts."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tensornet_compress.decompose.linalg import rank_one_parts
from tensornet_compress.metric import squared_norm
from tensornet_compress.searching import SpectrumStore
from tensornet_compress.searching.limits import Limit, View
from tensornet_compress.searching.shapes import mutual_information, searched_shapes
from tensornet_compress.searching.store import product_parts
from tensornet_compress.searching.topologies import native, side_by_side
from tensornet_compress.tensor import Tensorization, Topology


def product(order: tuple[int, ...], dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(3, 4, 5, generator=generator, dtype=dtype), torch.randn(4, 3, generator=generator, dtype=dtype)]
    return torch.einsum("abc,de->abcde", *parts).permute(order).contiguous()


def assert_product(parts, tensor):
    """The parts are those of ``tensor``, up to their scales."""
    labels = "abcdefgh"
    joined = ",".join("".join(labels[mode] for mode in modes) for modes, _ in parts)
    made = torch.einsum(f"{joined}->{labels[: tensor.ndim]}", *(part.double() for _, part in parts))
    share = float((made * tensor).sum() / (made.norm() * tensor.double().norm()))
    assert abs(share) == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize("order", [(0, 1, 2, 3, 4), (3, 0, 4, 2, 1), (4, 2, 0, 1, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_parts_of_a_product_are_found(order, dtype):
    tensor = product(order, dtype)
    found = product_parts(tensor, squared_norm(tensor))
    assert sorted(sorted(order[mode] for mode in modes) for modes, _ in found) == [[0, 1, 2], [3, 4]]
    assert_product(found, tensor)


@pytest.mark.parametrize("tensor", [torch.randn(4, 5, 6), torch.zeros(3, 3, 3), torch.eye(16).reshape(4, 4, 16)])
def test_what_is_no_product_has_none(tensor):
    assert not product_parts(tensor, squared_norm(tensor))


def test_samples_alone_do_not_decide():
    tensor = torch.ones(40, 40, dtype=torch.float64)
    tensor[7, 9] = 2.0
    assert not product_parts(tensor, squared_norm(tensor))


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
    found = product_parts(tensor, squared_norm(tensor))
    assert sorted(sorted(modes) for modes, _ in found) == [[0, 3], [1, 4], [2, 5]]
    assert_product(found, tensor)


def test_factors_of_one_mode_and_of_several_are_told_apart():
    generator = torch.Generator().manual_seed(3)
    one, three, two = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((4,), (3, 2, 5), (4, 3)))
    tensor = torch.einsum("c,aeb,fd->abcdef", one, three, two).contiguous()
    found = product_parts(tensor, squared_norm(tensor))
    assert sorted(sorted(modes) for modes, _ in found) == [[0, 1, 4], [2], [3, 5]]
    assert_product(found, tensor)


def test_rank_one_parts_give_the_matrix_back():
    matrix = torch.outer(torch.randn(5), torch.randn(7))
    column, row = rank_one_parts(matrix)
    assert torch.allclose(torch.outer(column, row), matrix, atol=1e-6)


@given(st.permutations(range(6)), st.integers(0, 5))
def test_a_tree_of_a_product_is_made_of_those_of_its_factors(order, seed):
    generator = torch.Generator().manual_seed(seed)
    parts = [
        torch.randn(4, 5, generator=generator),
        torch.randn(3, 4, 2, generator=generator),
        torch.randn(3, generator=generator),
    ]
    tensor = torch.einsum("ab,cde,f->abcdef", *parts).permute(order).contiguous()
    store = SpectrumStore(tensor)
    view = View(store, Limit(1e-5), allowed=1e-10)
    mutual_information(view)
    groups = {frozenset(order[mode] for mode in modes) for modes, _ in store.factors()}
    assert groups == {frozenset({0, 1}), frozenset({2, 3, 4}), frozenset({5})}
    for shape in searched_shapes(view, Tensorization.native(tuple(tensor.shape)), ("tree",)):
        topology = shape.topology
        between = [bond for bond in range(len(topology.edges)) if store.rank(topology.side(bond), 1e-10 * store.energy) == 1]
        assert len(between) == 2
        sides = {frozenset(order[mode] for mode in topology.side(bond)) for bond in between}
        assert all(any(side & group == group or not side & group for side in sides) for group in groups)


def test_entropies_of_a_product_are_sums():
    tensor = product((3, 0, 4, 2, 1))
    store, whole = SpectrumStore(tensor), SpectrumStore(tensor)
    whole._sought = True
    for left in ({0}, {1, 3}, {0, 2}, {0, 1, 4}):
        assert store.entropy(left) == pytest.approx(whole.entropy(left), abs=1e-9)
    assert len(store.factors()) == 2


def test_joined_networks_keep_their_cores_and_bonds():
    joined = side_by_side([((2, 0), Topology.tree((0, 1))), ((1,), Topology.one_core(1)), ((3, 4, 5), Topology.train(3))])
    assert joined.legs == ((2,), (0,), (1,), (3,), (4,), (5,))
    assert joined.edges == ((0, 1), (0, 2), (2, 3), (3, 4), (4, 5))


@pytest.mark.parametrize(
    ("topology", "expected"),
    [
        (Topology.balanced_tree(range(6)), True),
        (Topology.tree((((0, 1), 2), (3, (4, 5)))), True),
        (Topology.tree((0, ((1, 2), 3))), True),
        (Topology.tree(((0, 2), (1, 3))), False),
        (Topology.balanced_tree([5, 4, 3, 2, 1, 0]), True),
        (Topology.two_cores(4, [0, 3]), False),
        (Topology.two_cores(4, [0, 1]), True),
        (Topology.train([(3, 2), (0, 1)]), True),
        (Topology.train([(2,), (3,), (0,), (1,)]), False),
        (Topology.train([(0, 3), (1, 2)]), False),
    ],
)
def test_trees_in_native_order_are_known_as_such(topology, expected):
    assert native(topology) == expected
