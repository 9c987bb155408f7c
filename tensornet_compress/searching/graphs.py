"""Shapes of networks over the modes of a tensor: orders of a train and trees, found from what the modes know of each other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations, permutations
from math import prod

import numpy as np
from scipy.sparse.csgraph import laplacian

from tensornet_compress.searching.store import SpectrumStore
from tensornet_compress.tensor import Topology
from tensornet_compress.tensor.topology import Nested

_SWEEPS = 10
Alive = Callable[[], bool]
"""False once the time is up."""
Legs = list[tuple[int, ...]]
"""Of every core the modes that sit on it."""
Widths = dict[tuple[int, int], int]
"""Of every bond, named by its two cores, the rank."""


def mutual_information(store: SpectrumStore, alive: Alive = lambda: True) -> np.ndarray:
    """Between all pairs of modes, in bits: ``S(a) + S(b) - S(ab)``, float64 (modes, modes); 0 for pairs that ``alive`` left no
    time for."""
    count = len(store.dims)
    found = np.zeros((count, count))
    if not alive():
        return found
    if factors := store.factors():
        # Modes of different factors of an outer product share nothing.
        for modes, part in factors:
            within = mutual_information(part, alive)
            for (i, a), (j, b) in permutations(enumerate(modes), 2):
                found[a, b] = within[i, j]
        return found
    single = [store.entropy({mode}) for mode in range(count)]
    for a, b in combinations(range(count), 2):
        if not alive():
            break
        found[a, b] = found[b, a] = max(0.0, single[a] + single[b] - store.entropy({a, b}))
    return found


def spectral_order(weights: np.ndarray) -> list[int]:
    """Items along the Fiedler vector of a graph: strongly tied ones come close together."""
    if len(weights) < 3:
        return list(range(len(weights)))
    matrix = np.asarray(laplacian(weights + 1e-9 * max(float(weights.max()), 1e-300)))
    vector = np.linalg.eigh(matrix)[1][:, 1]
    order = np.argsort(vector, kind="stable").tolist()
    return order if order[0] <= order[-1] else order[::-1]


def numbers(store: SpectrumStore, topology: Topology, allowed: float) -> int:
    """Stored numbers when every bond may drop an equal share of the squared norm ``allowed``; positions are modes."""
    share = allowed / max(1, len(topology.edges))
    ranks = [store.rank(topology.side(bond), share) for bond in range(len(topology.edges))]
    return sum(
        prod(store.dims[mode] for mode in legs) * prod(ranks[bond] for bond in topology.bonds_of(core))
        for core, legs in enumerate(topology.legs)
    )


def train_of(order: Sequence[int]) -> Topology:
    """A train with one mode per core, in this order."""
    return Topology.train([(mode,) for mode in order])


def improved_order(store: SpectrumStore, order: Sequence[int], allowed: float, alive: Alive) -> list[int]:
    """Neighbours change places while a train gets smaller; each exchange needs one new spectrum."""
    best = list(order)
    least = numbers(store, train_of(best), allowed)
    changed = True
    while changed and alive():
        changed = False
        for place in range(len(best) - 1):
            if not alive():
                break
            tried = [*best[:place], best[place + 1], best[place], *best[place + 2 :]]
            size = numbers(store, train_of(tried), allowed)
            if size < least:
                best, least, changed = tried, size, True
    return best


def agglomerated(store: SpectrumStore, alive: Alive) -> Nested:
    """A binary tree from the bottom up: again and again the two parts that share most information are joined."""
    parts: list[tuple[frozenset[int], Nested]] = [(frozenset({mode}), mode) for mode in range(len(store.dims))]
    shared: dict[tuple[frozenset[int], frozenset[int]], float] = {}

    def information(a: frozenset[int], b: frozenset[int]) -> float:
        if (a, b) not in shared:
            shared[a, b] = store.entropy(a) + store.entropy(b) - store.entropy(a | b)
        return shared[a, b]

    while len(parts) > 2:
        pairs = list(combinations(range(len(parts)), 2))
        if alive():
            # Information is judged beside the smaller entropy, or two large parts would always look alike.
            i, j = max(pairs, key=lambda pair: _tie(information(parts[pair[0]][0], parts[pair[1]][0]), pair))
        else:
            i, j = min(pairs, key=lambda pair: len(parts[pair[0]][0]) + len(parts[pair[1]][0]))
        joined = (parts[i][0] | parts[j][0], (parts[i][1], parts[j][1]))
        parts = [part for place, part in enumerate(parts) if place not in (i, j)] + [joined]
    return tuple(part for _, part in parts) if len(parts) == 2 else parts[0][1]


def _tie(information: float, pair: tuple[int, int]) -> tuple[float, int, int]:
    return round(information, 9), -pair[0], -pair[1]


def reconnected(store: SpectrumStore, topology: Topology, allowed: float, alive: Alive) -> Topology:
    """Local reconnection (2209.03196): at every bond between two inner cores, exchange subtrees across it while the network
    gets smaller. Each exchange needs one new spectrum."""
    best, least = topology, numbers(store, topology, allowed)
    changed = True
    while changed and alive():
        changed = False
        for bond in range(len(best.edges)):
            for tried in exchanges(best, bond):
                if not alive():
                    return best
                size = numbers(store, tried, allowed)
                if size < least:
                    best, least, changed = tried, size, True
                    break
    return best


def disentangled(store: SpectrumStore, topology: Topology, alive: Alive) -> Topology:
    """Exchange subtrees across each bond in turn so that its entropy is least, until nothing changes (PTEP 2023 ptad018)."""
    best = topology
    for _ in range(_SWEEPS):
        changed = False
        for bond in range(len(best.edges)):
            if not alive():
                return best
            least = store.entropy(best.side(bond)) - 1e-9
            a, b = best.edges[bond]
            for tried in exchanges(best, bond):
                entropy = store.entropy(tried.side(tried.edges.index((a, b))))
                if entropy < least:
                    best, least, changed = tried, entropy - 1e-9, True
            # The edges of a topology are sorted: an exchange may have moved this bond, which the next sweep then meets.
        if not changed:
            break
    return best


def caterpillar(order: Sequence[int]) -> Nested:
    """The tree of a train: modes join one after the other from both ends towards the middle."""
    half = (len(order) + 1) // 2
    left: Nested = order[0]
    for mode in order[1:half]:
        left = (left, mode)
    right: Nested = order[-1]
    for mode in reversed(order[half:-1]):
        right = (mode, right)
    return (left, right)


def side_by_side(parts: Sequence[tuple[Sequence[int], Topology]]) -> Topology:
    """The network of an outer product: those of its factors, with their modes in the whole, on a chain of further bonds."""
    legs: list[tuple[int, ...]] = []
    edges: list[tuple[int, int]] = []
    before: int | None = None
    for modes, topology in parts:
        first = len(legs)
        legs += [tuple(modes[position] for position in core) for core in topology.legs]
        edges += [(first + a, first + b) for a, b in topology.edges]
        if before is not None:
            edges.append((before, first))
        before = first
    return Topology.unchecked(legs=tuple(legs), edges=tuple(sorted(edges)))


def native(topology: Topology) -> bool:
    """Whether a network can be drawn with its modes in native order: every core holds neighbours, a train is in their order,
    and every bond of a tree cuts off neighbours."""
    if not all(_neighbours(sorted(legs)) for legs in topology.legs):
        return False
    if topology.is_chain:
        first = [min(legs) for legs in topology.legs]
        return first in (sorted(first), sorted(first, reverse=True))
    count = topology.positions
    sides = (topology.side(bond) for bond in range(len(topology.edges)))
    return all(_neighbours(side) or _neighbours([mode for mode in range(count) if mode not in side]) for side in sides)


def _neighbours(modes: Sequence[int]) -> bool:
    return not modes or modes[-1] - modes[0] == len(modes) - 1


def exchanges(topology: Topology, bond: int) -> list[Topology]:
    """The trees in which one neighbour of each end of ``bond`` has changed sides."""
    a, b = topology.edges[bond]
    near_a, near_b = (
        sorted({p + q - core for p, q in topology.edges if core in (p, q)} - {other}) for core, other in ((a, b), (b, a))
    )
    found = []
    for x in near_a:
        for y in near_b:
            edges = set(topology.edges)
            edges -= {(min(a, x), max(a, x)), (min(b, y), max(b, y))}
            edges |= {(min(b, x), max(b, x)), (min(a, y), max(a, y))}
            found.append(Topology.unchecked(legs=topology.legs, edges=tuple(sorted(edges))))
    return found


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
