"""Trees near the best: every neighbour is a tree, and a descent ends where no neighbour costs less."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tensornet_compress as tnc
from tensornet_compress.searching.candidates import Shape
from tensornet_compress.searching.limits import Deadline
from tensornet_compress.searching.shapes import descended
from tensornet_compress.searching.topologies import neighbours
from tensornet_compress.tensor import Tensorization, Topology

TRAIN = Topology.train([(0, 1), (2,), (3, 4), (5,)])
TREE = Topology(legs=((0,), (1, 5), (), (2, 3), (4,)), edges=((0, 2), (1, 2), (2, 3), (3, 4)))


def weighed(weights: dict[frozenset[int], float], shape: Shape) -> float:
    """Any cost of the sides that bonds cut, with a price for each core."""
    topology = shape.topology
    sides = [frozenset(topology.side(bond)) for bond in range(len(topology.edges))]
    return 3 * len(topology.legs) + sum(weights.get(side, 1.0 + len(side) % 2) for side in sides)


@pytest.mark.parametrize("topology", [TRAIN, TREE])
def test_neighbours_hold_every_leg_once(topology: Topology) -> None:
    found = list(neighbours(topology))
    assert len(set(found)) > 10
    for near in found:
        assert sorted(leg for legs in near.legs for leg in legs) == list(range(6))
        assert len(near.edges) == len(near.legs) - 1


@given(st.dictionaries(st.frozensets(st.integers(0, 5), min_size=1, max_size=5), st.floats(0, 9), max_size=12))
def test_a_descent_ends_where_nothing_near_costs_less(weights: dict[frozenset[int], float]) -> None:
    start = Shape("tt", Tensorization.native((2,) * 6), TRAIN)
    end = descended(start, lambda shape: weighed(weights, shape))
    least = weighed(weights, end)
    assert least <= weighed(weights, start)
    for topology in neighbours(end.topology):
        assert weighed(weights, Shape("tree", end.tensorization, topology)) >= least


def test_a_descent_that_has_no_time_is_its_start() -> None:
    start = Shape("tt", Tensorization.native((2,) * 6), TRAIN)
    assert descended(start, lambda shape: len(shape.topology.legs), Deadline(0.0)).topology == TRAIN


def test_small_networks_pay_for_no_core_too_many() -> None:
    generator = torch.Generator().manual_seed(0)
    parts = [torch.rand(shape, generator=generator) + 0.5 for shape in ((4, 4), (4, 4), (4, 4), (4,), (4,))]
    noise = torch.randn(4**8, generator=generator).reshape((4,) * 8)
    exact = torch.einsum("ae,bf,cg,d,h->abcdefgh", *parts)
    tensor = (exact + 0.1 * exact.norm() * noise / noise.norm()).reshape(256, 256)
    result = tnc.search(tensor, max_error=0.3, null=False, time_budget=60)
    assert result.finished
    # Three pairs in four bits with scale and zero point (8 + 3 bytes each), two single digits (2 + 3 each): a train merges the
    # last two into one core of 11.
    assert result.best.nbytes == 3 * 11 + 2 * 5
