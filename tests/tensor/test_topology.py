"""Topologies against networkx."""

import networkx as nx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tensornet_compress.errors import TensorNetError
from tensornet_compress.tensor import Topology
from tests.generators import is_path, named_topologies, permutations

TOPOLOGIES = st.integers(1, 6).flatmap(named_topologies)


@given(TOPOLOGIES)
def test_every_topology_is_a_tree_that_holds_each_position_once(topology):
    graph = topology.graph()
    assert nx.is_tree(graph)
    assert sorted(p for _, legs in graph.nodes(data="legs") for p in legs) == list(range(topology.positions))
    assert sorted(bond for _, _, bond in graph.edges(data="bond")) == list(range(len(topology.edges)))
    assert all(graph.nodes[core]["legs"] or graph.degree[core] >= 2 for core in graph)


@given(TOPOLOGIES)
def test_labels_of_a_core_are_its_legs_and_bonds(topology):
    graph = topology.graph()
    for core in graph:
        labels = topology.core_labels(core)
        bonds = {f"b{graph.edges[core, other]['bond']}" for other in graph[core]}
        legs = [f"p{p}" for p in topology.legs[core]]
        assert len(labels) == len(bonds) + len(legs)
        assert set(labels) == bonds | set(legs)
        assert {f"b{bond}" for bond in topology.bonds_of(core)} == bonds
    counts = [label for core in graph for label in topology.core_labels(core)]
    assert all(counts.count(f"b{bond}") == 2 for bond in range(len(topology.edges)))


@given(TOPOLOGIES)
def test_a_bond_splits_the_positions_as_networkx_says(topology):
    for bond, (a, b) in enumerate(topology.edges):
        graph = topology.graph()
        graph.remove_edge(a, b)
        wanted = sorted(p for core in nx.descendants(graph, a) | {a} for p in topology.legs[core])
        assert list(topology.side(bond)) == wanted


@given(TOPOLOGIES)
def test_chains_are_paths_with_legs(topology):
    assert topology.is_chain == is_path(topology)


@given(TOPOLOGIES)
def test_topologies_are_plain_data(topology):
    assert Topology.from_json(topology.to_json()) == topology


def test_the_named_topologies():
    assert Topology.one_core(3) == Topology(legs=((0, 1, 2),))
    assert Topology.two_cores(4, (2, 0)) == Topology(legs=((2, 0), (1, 3)), edges=((0, 1),))
    assert Topology.train(3) == Topology(legs=((0,), (1,), (2,)), edges=((0, 1), (1, 2)))
    assert Topology.train([(0, 2), (1, 3)]) == Topology(legs=((0, 2), (1, 3)), edges=((0, 1),))
    assert Topology.tree((0, 1)) == Topology.train(2)


@given(st.integers(1, 9).flatmap(permutations))
def test_the_balanced_tree_is_binary_and_shallow(order):
    graph = Topology.balanced_tree(order).graph()
    assert all(degree <= 3 for _, degree in graph.degree)
    assert nx.diameter(graph) <= 2 * max(1, (len(order) - 1).bit_length())
    assert all(len(legs) <= 1 for _, legs in graph.nodes(data="legs"))


def test_nested_brackets_become_transfer_cores():
    topology = Topology.tree(((0, 1), (2, (3, 4))))
    assert len(topology.edges) == 7
    assert {topology.side(bond) for bond in range(7)} & {(0, 1), (2, 3, 4)}
    assert sorted(map(len, topology.legs)) == [0, 0, 0, 1, 1, 1, 1, 1]
    three = Topology.tree((0, 1, 2))
    assert sorted(dict(three.graph().degree).values()) == [1, 1, 1, 3]


@pytest.mark.parametrize(
    ("legs", "edges", "message"),
    [
        (((0,), (1,)), (), "tree"),
        (((0,), (1,), (2,)), ((0, 1), (1, 2), (0, 2)), "tree"),
        (((0,), (1,)), ((0, 1), (0, 1)), "tree"),
        (((0,), (0,)), ((0, 1),), "exactly once"),
        (((0,), (2,)), ((0, 1),), "exactly once"),
        (((0,), (1,)), ((1, 0),), "a < b"),
        (((0,), (1,)), ((0, 2),), "a < b"),
        (((0, 1), ()), ((0, 1),), "neither a leg nor two bonds"),
        ((), (), "at least one core"),
    ],
)
def test_graphs_that_are_no_networks_are_refused(legs, edges, message):
    with pytest.raises(ValueError, match=message):
        Topology(legs=legs, edges=edges)


@pytest.mark.parametrize("left", [(), (0, 1, 2)])
def test_a_cut_needs_two_sides(left):
    with pytest.raises(TensorNetError, match="both sides"):
        Topology.two_cores(3, left)
