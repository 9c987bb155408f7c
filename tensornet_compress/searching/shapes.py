"""Which shapes a search looks at: the unsearched formats, and those found from the spectra of the tensor at hand."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from tensornet_compress.options.offered import SearchFamily, native_topologies
from tensornet_compress.searching.candidates import Shape
from tensornet_compress.searching.graphs import (
    Alive,
    agglomerated,
    caterpillar,
    disentangled,
    improved_order,
    mutual_information,
    native,
    numbers,
    reconnected,
    side_by_side,
    spectral_order,
    train_of,
)
from tensornet_compress.searching.store import EXACT_SIDE, SpectrumStore
from tensornet_compress.tensor import FibreOrder, Tensorization, Topology
from tensornet_compress.tensor.topology import Nested

_GLANCED = 4


def native_shapes(
    tensorization: Tensorization, families: Sequence[SearchFamily], orders: tuple[FibreOrder, ...] = ()
) -> Iterator[Shape]:
    """The usual formats over the digits in native order."""
    for family, topology in native_topologies(tensorization, families):
        name = "balanced tree" if family == "tree" else family
        yield Shape(name, tensorization, topology, orders, ordered=bool(orders))


def searched_shapes(
    store: SpectrumStore,
    tensorization: Tensorization,
    families: Sequence[SearchFamily],
    allowed: float,
    alive: Alive,
    orders: tuple[FibreOrder, ...] = (),
) -> Iterator[Shape]:
    """Cuts, trains and trees whose order of modes follows from what the modes share, at a squared norm ``allowed`` to drop."""
    count = len(tensorization.modes)
    if count < 3:
        return

    def shape(family: str, topology: Topology) -> Shape:
        return Shape(family, tensorization, topology, orders, ordered=bool(orders) or not native(topology))

    shared = mutual_information(store, alive)
    order = spectral_order(shared) if {"cut", "tt"} & set(families) else []
    if "cut" in families:
        cuts = [Topology.two_cores(count, sorted(side)) for side in _cuts(tensorization, order)]
        if any(store.side(cut.legs[0]) > EXACT_SIDE for cut in cuts):
            promise = [store.captured(cut.legs[0]) if alive() else 0.0 for cut in cuts]
            cuts = [cuts[int(place)] for place in np.argsort(-np.asarray(promise), kind="stable")[:_GLANCED]]
        sizes = [numbers(store, cut, allowed) if alive() else np.inf for cut in cuts]
        for place in np.argsort(sizes, kind="stable")[:2]:
            yield shape("cut", cuts[int(place)])
    if "tt" in families:
        starts = [list(range(count)), order]
        best = min(starts, key=lambda start: numbers(store, train_of(start), allowed))
        yield shape("tt", train_of(improved_order(store, best, allowed, alive)))
    if "ttm" in families and len(tensorization.shape) == 2:
        pairs = _tied_pairs(shared)
        yield shape("ttm", Topology.train([pairs[i] for i in spectral_order(_between(shared, pairs))]))
    if "tree" in families:
        for tree in _trees(store, allowed, alive):
            yield shape("tree", tree)


def _trees(store: SpectrumStore, allowed: float, alive: Alive) -> Iterator[Topology]:
    """Trees by what modes share, each improved by exchanges; of an outer product trees of its factors, joined."""
    factors = sorted(store.factors(), key=lambda factor: factor[0])
    if factors:
        scales = [part.energy / max(store.energy, 1e-300) for _, part in factors]
        found = [list(_trees(part, allowed * scale, alive)) for (_, part), scale in zip(factors, scales)]
        for number in range(max(map(len, found))):
            yield side_by_side([(modes, trees[min(number, len(trees) - 1)]) for (modes, _), trees in zip(factors, found)])
        return
    count = len(store.dims)
    if count < 3:
        yield Topology.balanced_tree(range(count))
        return
    yield reconnected(store, Topology.tree(agglomerated(store, alive)), allowed, alive)
    order = spectral_order(mutual_information(store, alive))
    yield reconnected(store, Topology.tree(_halved(order)), allowed, alive)
    loose = disentangled(store, Topology.tree(caterpillar(range(count))), alive)
    yield loose
    yield reconnected(store, loose, allowed, alive)


def _cuts(tensorization: Tensorization, order: Sequence[int]) -> list[tuple[int, ...]]:
    """Kronecker cuts (leading digits of some axes) and prefixes of the spectral order; each at least 1/16 of the largest."""
    count = len(tensorization.modes)
    axes = [[m for m, owner in enumerate(tensorization.mode_axes) if owner == a] for a in range(len(tensorization.shape))]
    found = {tuple(sorted(order[:cut])) for cut in range(1, count)}
    if len(axes) <= 3:
        sides: list[tuple[int, ...]] = [()]
        for axis in axes:
            sides = [(*side, *axis[:cut]) for side in sides for cut in range(len(axis) + 1)]
        found |= {side for side in sides if 0 < len(side) < count}
    logs = np.log2(np.asarray(tensorization.modes, dtype=np.float64))
    total = float(logs.sum())

    def shorter(side: tuple[int, ...]) -> float:
        length = float(logs[list(side)].sum())
        return min(length, total - length)

    most = max(map(shorter, found))
    return sorted(side for side in found if shorter(side) >= most - 4)


def _tied_pairs(shared: np.ndarray) -> list[tuple[int, ...]]:
    """Modes in pairs, those that share most first; an odd one stays alone."""
    left = set(range(len(shared)))
    pairs: list[tuple[int, ...]] = []
    for a, b in sorted(((a, b) for a in left for b in left if a < b), key=lambda pair: (-round(float(shared[pair]), 9), pair)):
        if a in left and b in left:
            pairs.append((a, b))
            left -= {a, b}
    return pairs + [(mode,) for mode in sorted(left)]


def _between(shared: np.ndarray, groups: Sequence[Sequence[int]]) -> np.ndarray:
    return np.array([[0.0 if g is h else float(shared[np.ix_(g, h)].sum()) for h in groups] for g in groups])


def _halved(order: Sequence[int]) -> Nested:
    return order[0] if len(order) == 1 else (_halved(order[: len(order) // 2]), _halved(order[len(order) // 2 :]))
