"""Descent over topologies by bytes: legs change cores while the network, its formats' scales and zero points included, shrinks.

Where a network is small, what a core costs besides its numbers decides, which no entropy tells.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import combinations

from tensornet_compress.coding import IntFormat
from tensornet_compress.searching.candidates import Candidate, Shape
from tensornet_compress.searching.graphs import native
from tensornet_compress.tensor import Topology

_LARGEST_NBYTES = 2048


def pays(candidate: Candidate) -> bool:
    """Whether a descent is worth its time: the network is small, and its cores have scales."""
    return isinstance(candidate.fmt, IntFormat) and candidate.nbytes <= _LARGEST_NBYTES


def descended(shape: Shape, cost: Callable[[Shape], float], alive: Callable[[], bool]) -> Shape:
    """A tree none of whose neighbours costs less; ``cost`` may be infinite. Deterministic: the first cheaper one is taken."""
    best, least = replace(shape, family="tree"), cost(shape)
    seen = {best.topology}
    changed = True
    while changed:
        changed = False
        for topology in neighbours(best.topology):
            if not alive():
                return _marked(best)
            if topology in seen:
                continue
            seen.add(topology)
            tried = replace(best, topology=topology)
            price = cost(tried)
            if price < least:
                best, least, changed = tried, price, True
                break
    return _marked(best)


def _marked(shape: Shape) -> Shape:
    return replace(shape, ordered=bool(shape.fibre_orders) or not native(shape.topology))


def neighbours(topology: Topology) -> Iterator[Topology]:
    """Topologies in which one leg sits on another core or on a core of its own, or two legs have changed places."""
    cores = range(len(topology.legs))
    homes = [(core, leg) for core in cores for leg in topology.legs[core]]
    for home, leg in homes:
        for core in cores:
            if core != home:
                yield _tree(_moved(topology, {leg: core}), topology.edges)
        if len(topology.legs[home]) > 1:
            yield _tree([*_moved(topology, {leg: len(cores)}), [leg]], [*topology.edges, (home, len(cores))])
    for (home, leg), (away, other) in combinations(homes, 2):
        if home != away:
            yield _tree(_moved(topology, {leg: away, other: home}), topology.edges)


def _moved(topology: Topology, to: dict[int, int]) -> list[list[int]]:
    """Legs by core; where a leg goes to a core that is not there yet, it is left out."""
    return [
        sorted([leg for leg in legs if leg not in to] + [leg for leg, core in to.items() if core == number])
        for number, legs in enumerate(topology.legs)
    ]


def _tree(legs: Sequence[Sequence[int]], edges: Sequence[tuple[int, int]]) -> Topology:
    """A topology without cores that have neither a leg nor two bonds."""
    kept, bonds = dict(enumerate(legs)), set(edges)
    while bare := [core for core in kept if not kept[core] and sum(core in bond for bond in bonds) < 2]:
        del kept[bare[0]]
        bonds = {bond for bond in bonds if bare[0] not in bond}
    place = {core: number for number, core in enumerate(kept)}
    return Topology(
        legs=tuple(tuple(legs) for legs in kept.values()), edges=tuple(sorted((place[a], place[b]) for a, b in bonds))
    )
