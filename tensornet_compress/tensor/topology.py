"""Topologies: which legs sit on which core, and which cores share a bond. Always a tree."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Self

import networkx as nx
from pydantic import model_validator

from tensornet_compress.errors import TensorNetError
from tensornet_compress.frozen import Frozen

MOST_CORES = 256
Nested = int | Sequence["Nested"]


class Topology(Frozen):
    """A tree of cores: ``legs[c]`` are the positions of the laid-out tensor on core ``c``, ``edges`` the bonds (a < b).

    A core may have no leg (a transfer core of a tree network). Every position sits on exactly one core.

    >>> import tensornet_compress as tnc
    >>> tnc.Topology.train(3)
    Topology(legs=((0,), (1,), (2,)), edges=((0, 1), (1, 2)))
    >>> tnc.Topology.tree(((0, 1), 2)).legs
    ((), (0,), (1,), (2,))
    """

    legs: tuple[tuple[int, ...], ...]
    edges: tuple[tuple[int, int], ...] = ()

    @model_validator(mode="after")
    def _check(self) -> Self:
        if len(self.legs) > MOST_CORES:
            raise ValueError(f"a network of {len(self.legs)} cores; at most {MOST_CORES} can be")
        positions = sorted(position for legs in self.legs for position in legs)
        if positions != list(range(len(positions))):
            raise ValueError(f"legs {self.legs} must hold each position 0..{len(positions) - 1} exactly once")
        for a, b in self.edges:
            if not 0 <= a < b < len(self.legs):
                raise ValueError(f"edge {(a, b)} must join cores a < b of {len(self.legs)} cores")
        if not self.legs:
            raise ValueError("a network needs at least one core")
        if len(self.edges) != len(self.legs) - 1 or _has_cycle(len(self.legs), self.edges):
            raise ValueError(f"edges {self.edges} do not make a tree of {len(self.legs)} cores")
        ends = [core for edge in self.edges for core in edge]
        for core, legs in enumerate(self.legs):
            if not legs and ends.count(core) < 2:
                raise ValueError(f"core {core} has neither a leg nor two bonds")
        return self

    @classmethod
    def unchecked(cls, legs: tuple[tuple[int, ...], ...], edges: tuple[tuple[int, int], ...]) -> Topology:
        """Without the checks, for what was made from a topology by steps that keep a tree a tree."""
        return cls.model_construct(legs=legs, edges=edges)

    @classmethod
    def one_core(cls, positions: int) -> Topology:
        """The dense tensor."""
        return _one_core(positions)

    @classmethod
    def two_cores(cls, positions: int, left: Sequence[int]) -> Topology:
        """A cut of the positions in ``left`` and the rest: row|col of a matrix is its truncated SVD."""
        rest = tuple(position for position in range(positions) if position not in set(left))
        if not left or not rest:
            raise TensorNetError(f"a cut of {positions} positions needs both sides non-empty, was given left={tuple(left)}")
        return cls(legs=(tuple(left), rest), edges=((0, 1),))

    @classmethod
    def train(cls, groups: int | Sequence[Sequence[int]]) -> Topology:
        """A chain: one position per core for an int (tensor train), else the given groups (pairs give a TT-matrix)."""
        legs = tuple((p,) for p in range(groups)) if isinstance(groups, int) else tuple(tuple(group) for group in groups)
        return cls(legs=legs, edges=tuple((i, i + 1) for i in range(len(legs) - 1)))

    @classmethod
    def tree(cls, nested: Nested) -> Topology:
        """A tree from nested sequences of positions, e.g. ``((0, 1), (2, (3, 4)))``.

        Each position gets a leaf core and each pair of brackets a transfer core; the outermost pair, when it has two
        members, is a bond rather than a core, so ``(0, 1)`` is two cores.
        """
        legs: list[tuple[int, ...]] = []
        edges: list[tuple[int, int]] = []

        def build(part: Nested) -> int:
            core = len(legs)
            legs.append((part,) if isinstance(part, int) else ())
            if not isinstance(part, int):
                edges.extend((core, build(child)) for child in part)
            return core

        if isinstance(nested, int) or len(nested) == 1:
            build(nested if isinstance(nested, int) else nested[0])
        elif len(nested) == 2:
            left = build(nested[0])
            edges.append((left, build(nested[1])))
        else:
            build(nested)
        return cls(legs=tuple(legs), edges=tuple(sorted(edges)))

    @classmethod
    def balanced_tree(cls, positions: Sequence[int]) -> Topology:
        """The balanced binary tree over positions in the given order (hierarchical Tucker)."""
        return _balanced(tuple(positions))

    @property
    def positions(self) -> int:
        """Number of open legs."""
        return sum(len(legs) for legs in self.legs)

    @property
    def is_chain(self) -> bool:
        """True when the cores form the path 0 - 1 - ... and every core has a leg."""
        return all(self.legs) and self.edges == tuple((i, i + 1) for i in range(len(self.legs) - 1))

    def graph(self) -> nx.Graph:
        """The networkx graph; nodes carry ``legs``, edges carry ``bond`` (their number)."""
        graph: nx.Graph = nx.Graph()
        for core, legs in enumerate(self.legs):
            graph.add_node(core, legs=legs)
        for bond, (a, b) in enumerate(self.edges):
            graph.add_edge(a, b, bond=bond)
        return graph

    def bonds_of(self, core: int) -> tuple[int, ...]:
        """Numbers of the bonds of a core, by ascending neighbour."""
        return _bonds(len(self.legs), self.edges)[core]

    def core_labels(self, core: int) -> tuple[str, ...]:
        """Labels of a core's axes: bonds to lower cores, legs, bonds to higher cores (``p3``: position 3, ``b1``: bond 1)."""
        return self.all_labels[core]

    @property
    def all_labels(self) -> tuple[tuple[str, ...], ...]:
        """``core_labels`` of every core."""
        return _labels(self.legs, self.edges)

    def side(self, bond: int) -> tuple[int, ...]:
        """Positions on the lower core's side of a bond, ascending."""
        return _sides(self.legs, self.edges)[bond]


@lru_cache(maxsize=256)
def _one_core(positions: int) -> Topology:
    return Topology(legs=(tuple(range(positions)),))


@lru_cache(maxsize=256)
def _balanced(positions: tuple[int, ...]) -> Topology:
    def halve(part: Sequence[int]) -> Nested:
        return part[0] if len(part) == 1 else (halve(part[: len(part) // 2]), halve(part[len(part) // 2 :]))

    return Topology.tree(halve(positions))


def _has_cycle(cores: int, edges: tuple[tuple[int, int], ...]) -> bool:
    """Whether some edge joins two cores that earlier ones connect already."""
    above = list(range(cores))
    for a, b in edges:
        while above[a] != a:
            a = above[a]
        while above[b] != b:
            b = above[b]
        if a == b:
            return True
        above[b] = a
    return False


@lru_cache(maxsize=4096)
def _bonds(cores: int, edges: tuple[tuple[int, int], ...]) -> tuple[tuple[int, ...], ...]:
    """Numbers of the bonds of every core, by ascending neighbour."""
    touching: list[list[tuple[int, int]]] = [[] for _ in range(cores)]
    for bond, (a, b) in enumerate(edges):
        touching[a].append((b, bond))
        touching[b].append((a, bond))
    return tuple(tuple(bond for _, bond in sorted(bonds)) for bonds in touching)


@lru_cache(maxsize=4096)
def _labels(legs: tuple[tuple[int, ...], ...], edges: tuple[tuple[int, int], ...]) -> tuple[tuple[str, ...], ...]:
    """Labels of every core's axes."""
    labels = []
    for core, bonds in enumerate(_bonds(len(legs), edges)):
        lower = [f"b{bond}" for bond in bonds if edges[bond][1] == core]
        higher = [f"b{bond}" for bond in bonds if edges[bond][0] == core]
        labels.append((*lower, *(f"p{position}" for position in legs[core]), *higher))
    return tuple(labels)


@lru_cache(maxsize=4096)
def _sides(legs: tuple[tuple[int, ...], ...], edges: tuple[tuple[int, int], ...]) -> tuple[tuple[int, ...], ...]:
    """Positions on the lower core's side of every bond: what hangs below each core, summed from the leaves up."""
    neighbours: list[list[int]] = [[] for _ in legs]
    for a, b in edges:
        neighbours[a].append(b)
        neighbours[b].append(a)
    parent, order = {0: -1}, [0]
    for core in order:
        for other in neighbours[core]:
            if other != parent[core]:
                parent[other] = core
                order.append(other)
    below = [set(core) for core in legs]
    for core in reversed(order[1:]):
        below[parent[core]] |= below[core]
    everything = below[0]
    return tuple(tuple(sorted(below[a] if parent[a] == b else everything - below[b])) for a, b in edges)
