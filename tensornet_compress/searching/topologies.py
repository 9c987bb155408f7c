"""Edits of topologies: drawn from parts, exchanged, moved, merged. Positions are the modes of a tensor in native order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import reduce
from itertools import combinations, pairwise
from math import prod

from tensornet_compress.tensor import Topology
from tensornet_compress.tensor.topology import Nested

Legs = list[tuple[int, ...]]
"""Of every core the modes that sit on it."""
Widths = dict[tuple[int, int], int]
"""Of every bond, named by its two cores, the rank."""


def native(topology: Topology) -> bool:
    """Whether a network can be drawn with its modes in native order: every core holds neighbours, a train is in their order,
    and every bond of a tree cuts off neighbours."""
    if not all(_adjacent(sorted(legs)) for legs in topology.legs):
        return False
    if topology.is_chain:
        first = [min(legs) for legs in topology.legs]
        return first in (sorted(first), sorted(first, reverse=True))
    count = topology.positions
    sides = (topology.side(bond) for bond in range(len(topology.edges)))
    return all(_adjacent(side) or _adjacent([mode for mode in range(count) if mode not in side]) for side in sides)


def _adjacent(modes: Sequence[int]) -> bool:
    """Whether ascending modes have no gap."""
    return not modes or modes[-1] - modes[0] == len(modes) - 1


def caterpillar(order: Sequence[int]) -> Nested:
    """The tree of a train: modes join one after the other from both ends towards the middle."""
    parts: list[Nested] = list(order)
    half = (len(order) + 1) // 2
    right = parts[: half - 1 : -1]
    return reduce(lambda inner, mode: (inner, mode), parts[:half]), reduce(lambda inner, mode: (mode, inner), right)


def side_by_side(parts: Sequence[tuple[Sequence[int], Topology]]) -> Topology:
    """The network of an outer product: those of its factors, with their modes in the whole, on a chain of further bonds."""
    legs: list[tuple[int, ...]] = []
    edges: list[tuple[int, int]] = []
    starts: list[int] = []
    for modes, topology in parts:
        starts.append(len(legs))
        edges += [(len(legs) + a, len(legs) + b) for a, b in topology.edges]
        legs += [tuple(modes[position] for position in core) for core in topology.legs]
    return Topology.unchecked(legs=tuple(legs), edges=tuple(sorted([*edges, *pairwise(starts)])))


def swaps(train: Topology, bond: int) -> list[Topology]:
    """The train in which the two cores at ``bond`` have changed places."""
    legs = train.legs
    return [Topology.unchecked(legs=(*legs[:bond], legs[bond + 1], legs[bond], *legs[bond + 2 :]), edges=train.edges)]


def exchanges(topology: Topology, bond: int) -> list[Topology]:
    """The trees in which one neighbour of each end of ``bond`` has changed sides."""
    a, b = topology.edges[bond]
    near_a, near_b = (
        sorted({p + q - core for p, q in topology.edges if core in (p, q)} - {other}) for core, other in ((a, b), (b, a))
    )
    trees = []
    for x in near_a:
        for y in near_b:
            edges = set(topology.edges)
            edges -= {(min(a, x), max(a, x)), (min(b, y), max(b, y))}
            edges |= {(min(b, x), max(b, x)), (min(a, y), max(a, y))}
            trees.append(Topology.unchecked(legs=topology.legs, edges=tuple(sorted(edges))))
    return trees


def neighbours(topology: Topology) -> Iterator[Topology]:
    """Topologies in which one leg sits on another core or on a core of its own, or two legs have changed places."""
    cores = range(len(topology.legs))
    homes = [(core, leg) for core in cores for leg in topology.legs[core]]
    for home, leg in homes:
        for core in cores:
            if core != home:
                yield _pruned(_moved(topology, {leg: core}), topology.edges)
        if len(topology.legs[home]) > 1:
            yield _pruned([*_moved(topology, {leg: len(cores)}), [leg]], [*topology.edges, (home, len(cores))])
    for (home, leg), (away, other) in combinations(homes, 2):
        if home != away:
            yield _pruned(_moved(topology, {leg: away, other: home}), topology.edges)


def _moved(topology: Topology, to: dict[int, int]) -> list[list[int]]:
    """Legs by core; where a leg goes to a core that is not there yet, it is left out."""
    return [
        sorted([leg for leg in legs if leg not in to] + [leg for leg, core in to.items() if core == number])
        for number, legs in enumerate(topology.legs)
    ]


def _pruned(legs: Sequence[Sequence[int]], edges: Sequence[tuple[int, int]]) -> Topology:
    """A topology without cores that have neither a leg nor two bonds."""
    kept, bonds = dict(enumerate(legs)), set(edges)
    while bare := [core for core in kept if not kept[core] and sum(core in bond for bond in bonds) < 2]:
        del kept[bare[0]]
        bonds = {bond for bond in bonds if bare[0] not in bond}
    place = {core: number for number, core in enumerate(kept)}
    return Topology(
        legs=tuple(tuple(legs) for legs in kept.values()), edges=tuple(sorted((place[a], place[b]) for a, b in bonds))
    )


def merged(topology: Topology, dims: Sequence[int], ranks: Sequence[int], overhead: float = 0.0) -> Topology:
    """Neighbouring cores are contracted while that stores no more numbers at these ranks: a bond of full rank is of no use.
    ``overhead``: what a core takes besides its numbers, in numbers (the scale of a small integer core)."""
    legs, widths = list(topology.legs), dict(zip(topology.edges, ranks))
    sizes = _sizes(legs, dims, widths)
    while widths:
        saved, edge = _most_saved(sizes, widths)
        if saved + overhead < 0:
            break
        sizes[edge[0]] += sizes.pop(edge[1]) - saved
        legs, widths = _contracted(legs, widths, edge)
    return topology if len(legs) == len(topology.legs) else Topology.unchecked(legs=tuple(legs), edges=tuple(widths))


def with_one_core_less(topology: Topology, dims: Sequence[int], ranks: Sequence[int]) -> Topology:
    """Those two neighbouring cores are contracted which that makes least larger."""
    legs, widths = list(topology.legs), dict(zip(topology.edges, ranks))
    legs, widths = _contracted(legs, widths, _most_saved(_sizes(legs, dims, widths), widths)[1])
    return Topology.unchecked(legs=tuple(legs), edges=tuple(widths))


def _sizes(legs: Legs, dims: Sequence[int], widths: Widths) -> list[int]:
    """Of every core the count of its numbers."""
    sizes = [prod(dims[position] for position in core) for core in legs]
    for (a, b), width in widths.items():
        sizes[a] *= width
        sizes[b] *= width
    return sizes


def _most_saved(sizes: Sequence[int], widths: Widths) -> tuple[int, tuple[int, int]]:
    """The bond whose two cores are most numbers smaller when contracted (the first of equals), and how many that are."""
    saved = {(a, b): sizes[a] + sizes[b] - sizes[a] * sizes[b] // width**2 for (a, b), width in widths.items()}
    edge = max(saved, key=saved.__getitem__)
    return saved[edge], edge


def _contracted(legs: Legs, widths: Widths, edge: tuple[int, int]) -> tuple[Legs, Widths]:
    kept, gone = edge
    place = [core - (core > gone) for core in range(len(legs))]
    place[gone] = place[kept]
    moved = {}
    for pair, width in widths.items():
        if pair != edge:
            a, b = place[pair[0]], place[pair[1]]
            moved[min(a, b), max(a, b)] = width
    joined = [core + legs[gone] if number == kept else core for number, core in enumerate(legs) if number != gone]
    return joined, dict(sorted(moved.items()))
