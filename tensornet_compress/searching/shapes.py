"""Which shapes a search looks at: the usual formats, and orders and trees found from what modes know of each other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import combinations, permutations
from math import prod

import numpy as np
from scipy.sparse.csgraph import laplacian

from tensornet_compress.options.offered import SearchFamily, native_topologies
from tensornet_compress.searching.candidates import Shape
from tensornet_compress.searching.limits import NEVER, Deadline, View
from tensornet_compress.searching.store import EXACT_SIDE
from tensornet_compress.searching.topologies import caterpillar, exchanges, native, neighbours, side_by_side, swaps
from tensornet_compress.tensor import FibreOrder, Tensorization, Topology
from tensornet_compress.tensor.topology import Nested

_GLANCED = 4
_SWEEPS = 10


def native_shapes(
    tensorization: Tensorization, families: Sequence[SearchFamily], orders: tuple[FibreOrder, ...] = ()
) -> Iterator[Shape]:
    """The usual formats over the digits in native order."""
    for family, topology in native_topologies(tensorization, families):
        name = "balanced tree" if family == "tree" else family
        yield Shape(name, tensorization, topology, orders, ordered=bool(orders))


def searched_shapes(
    view: View, tensorization: Tensorization, families: Sequence[SearchFamily], orders: tuple[FibreOrder, ...] = ()
) -> Iterator[Shape]:
    """Cuts, trains and trees whose order of modes follows from what the modes share, at the squared norm allowed."""
    count = len(tensorization.modes)
    if count < 3:
        return

    def shape(family: str, topology: Topology) -> Shape:
        return Shape(family, tensorization, topology, orders, ordered=bool(orders) or not native(topology))

    shared = mutual_information(view)
    order = spectral_order(shared) if {"cut", "tt"} & set(families) else []
    if "cut" in families:
        for cut in _best_cuts(view, _cuts(tensorization, order)):
            yield shape("cut", cut)
    if "tt" in families:
        start = min(Topology.train(count), train_of(order), key=lambda train: numbers(view, train))
        yield shape("tt", improved(view, start, swaps))
    if "ttm" in families and len(tensorization.shape) == 2:
        pairs = _tied_pairs(shared)
        between = [[0.0 if g is h else float(shared[np.ix_(g, h)].sum()) for h in pairs] for g in pairs]
        yield shape("ttm", Topology.train([pairs[i] for i in spectral_order(np.array(between))]))
    if "tree" in families:
        for tree in _trees(view):
            yield shape("tree", tree)


def _cuts(tensorization: Tensorization, order: Sequence[int]) -> list[Topology]:
    """Kronecker cuts (leading digits of some axes) and prefixes of the spectral order; each at least 1/16 of the largest."""
    count = len(tensorization.modes)
    axes = [[m for m, owner in enumerate(tensorization.mode_axes) if owner == a] for a in range(len(tensorization.shape))]
    cuts = {tuple(sorted(order[:cut])) for cut in range(1, count)}
    if len(axes) <= 3:
        sides: list[tuple[int, ...]] = [()]
        for axis in axes:
            sides = [(*side, *axis[:cut]) for side in sides for cut in range(len(axis) + 1)]
        cuts |= {side for side in sides if 0 < len(side) < count}
    logs = np.log2(np.asarray(tensorization.modes, dtype=np.float64))
    total = float(logs.sum())

    def shorter(side: tuple[int, ...]) -> float:
        length = float(logs[list(side)].sum())
        return min(length, total - length)

    most = max(map(shorter, cuts))
    return [Topology.two_cores(count, side) for side in sorted(cuts) if shorter(side) >= most - 4]


def _best_cuts(view: View, cuts: list[Topology]) -> Iterator[Topology]:
    """The two that take fewest numbers; of large ones only those are computed that a glance shows to be promising."""
    store, deadline = view.store, view.deadline
    if any(store.side(cut.legs[0]) > EXACT_SIDE for cut in cuts):
        promise = [0.0 if deadline.passed() else store.captured(cut.legs[0]) for cut in cuts]
        cuts = [cuts[int(place)] for place in np.argsort(-np.asarray(promise), kind="stable")[:_GLANCED]]
    sizes = [np.inf if deadline.passed() else numbers(view, cut) for cut in cuts]
    for place in np.argsort(sizes, kind="stable")[:2]:
        yield cuts[int(place)]


def _tied_pairs(shared: np.ndarray) -> list[tuple[int, ...]]:
    """Modes in pairs, those that share most first; an odd one stays alone."""
    left = set(range(len(shared)))
    pairs: list[tuple[int, ...]] = []
    for a, b in sorted(combinations(left, 2), key=lambda pair: (-round(float(shared[pair]), 9), pair)):
        if a in left and b in left:
            pairs.append((a, b))
            left -= {a, b}
    return pairs + [(mode,) for mode in sorted(left)]


def _trees(view: View) -> Iterator[Topology]:
    """Trees by what modes share, each improved by exchanges; of an outer product trees of its factors, joined."""
    if factors := sorted(view.factors(), key=lambda factor: factor[0]):
        by_factor = [(modes, list(_trees(part))) for modes, part in factors]
        for number in range(max(len(trees) for _, trees in by_factor)):
            yield side_by_side([(modes, trees[min(number, len(trees) - 1)]) for modes, trees in by_factor])
        return
    count = len(view.store.dims)
    if count < 3:
        yield Topology.balanced_tree(range(count))
        return
    yield improved(view, Topology.tree(agglomerated(view)), exchanges)
    yield improved(view, Topology.balanced_tree(spectral_order(mutual_information(view))), exchanges)
    loose = disentangled(view, Topology.tree(caterpillar(range(count))))
    yield loose
    yield improved(view, loose, exchanges)


def mutual_information(view: View) -> np.ndarray:
    """Between all pairs of modes, in bits: ``S(a) + S(b) - S(ab)``, float64 (modes, modes); 0 for pairs that there was no time
    for."""
    store = view.store
    count = len(store.dims)
    shared = np.zeros((count, count))
    if view.deadline.passed():
        return shared
    if factors := view.factors():
        # Modes of different factors of an outer product share nothing.
        for modes, part in factors:
            within = mutual_information(part)
            for (i, a), (j, b) in permutations(enumerate(modes), 2):
                shared[a, b] = within[i, j]
        return shared
    single = [store.entropy({mode}) for mode in range(count)]
    for a, b in combinations(range(count), 2):
        if view.deadline.passed():
            break
        shared[a, b] = shared[b, a] = max(0.0, single[a] + single[b] - store.entropy({a, b}))
    return shared


def spectral_order(weights: np.ndarray) -> list[int]:
    """Items along the Fiedler vector of a graph: strongly tied ones come close together."""
    if len(weights) < 3:
        return list(range(len(weights)))
    matrix = np.asarray(laplacian(weights + 1e-9 * max(float(weights.max()), 1e-300)))
    order = np.argsort(np.linalg.eigh(matrix)[1][:, 1], kind="stable").tolist()
    return order if order[0] <= order[-1] else order[::-1]


def numbers(view: View, topology: Topology) -> int:
    """Stored numbers when every bond may drop an equal share of the squared norm that is allowed; positions are modes."""
    share = view.allowed / max(1, len(topology.edges))
    ranks = [view.store.rank(topology.side(bond), share) for bond in range(len(topology.edges))]
    return sum(
        prod(view.store.dims[mode] for mode in legs) * prod(ranks[bond] for bond in topology.bonds_of(core))
        for core, legs in enumerate(topology.legs)
    )


def train_of(order: Sequence[int]) -> Topology:
    """A train with one mode per core, in this order."""
    return Topology.train([(mode,) for mode in order])


def agglomerated(view: View) -> Nested:
    """A binary tree from the bottom up: again and again the two parts that share most information are joined."""
    store = view.store
    parts: list[tuple[frozenset[int], Nested]] = [(frozenset({mode}), mode) for mode in range(len(store.dims))]
    shared: dict[tuple[frozenset[int], frozenset[int]], float] = {}

    def tie(pair: tuple[int, int]) -> tuple[float, int, int]:
        a, b = parts[pair[0]][0], parts[pair[1]][0]
        if (a, b) not in shared:
            shared[a, b] = store.entropy(a) + store.entropy(b) - store.entropy(a | b)
        return round(shared[a, b], 9), -pair[0], -pair[1]

    while len(parts) > 2:
        pairs = list(combinations(range(len(parts)), 2))
        if view.deadline.passed():
            i, j = min(pairs, key=lambda pair: len(parts[pair[0]][0]) + len(parts[pair[1]][0]))
        else:
            i, j = max(pairs, key=tie)
        joined = (parts[i][0] | parts[j][0], (parts[i][1], parts[j][1]))
        parts = [part for place, part in enumerate(parts) if place not in (i, j)] + [joined]
    return tuple(part for _, part in parts) if len(parts) == 2 else parts[0][1]


def improved(view: View, topology: Topology, changes: Callable[[Topology, int], list[Topology]]) -> Topology:
    """At every bond in turn the first of the ``changes`` there that makes the network smaller, until none does; each needs one
    new spectrum. With ``exchanges`` of subtrees this is local reconnection (2209.03196)."""
    best, least = topology, numbers(view, topology)
    changed = True
    while changed:
        changed = False
        for bond in range(len(best.edges)):
            for tried in changes(best, bond):
                if view.deadline.passed():
                    return best
                size = numbers(view, tried)
                if size < least:
                    best, least, changed = tried, size, True
                    break
    return best


def disentangled(view: View, topology: Topology) -> Topology:
    """Exchange subtrees across each bond in turn so that its entropy is least, until nothing changes (PTEP 2023 ptad018)."""
    best, entropy = topology, view.store.entropy
    for _ in range(_SWEEPS):
        changed = False
        for bond in range(len(best.edges)):
            if view.deadline.passed():
                return best
            least = entropy(best.side(bond)) - 1e-9
            ends = best.edges[bond]
            for tried in exchanges(best, bond):
                crossing = entropy(tried.side(tried.edges.index(ends)))
                if crossing < least:
                    best, least, changed = tried, crossing - 1e-9, True
            # The edges of a topology are sorted: an exchange may have moved this bond, which the next sweep then meets.
        if not changed:
            break
    return best


def descended(shape: Shape, cost: Callable[[Shape], float], deadline: Deadline = NEVER) -> Shape:
    """A tree none of whose neighbours costs less: legs change cores while a network shrinks, the scales and zero points of its
    cores included. Where a network is small these decide, of which no entropy tells. Deterministic: the first cheaper one is
    taken. ``cost`` may be infinite."""
    best, least = replace(shape, family="tree"), cost(shape)
    seen = {best.topology}
    changed = True
    while changed:
        changed = False
        for topology in neighbours(best.topology):
            if deadline.passed():
                break
            if topology in seen:
                continue
            seen.add(topology)
            tried = replace(best, topology=topology)
            price = cost(tried)
            if price < least:
                best, least, changed = tried, price, True
                break
    return replace(best, ordered=bool(best.fibre_orders) or not native(best.topology))
