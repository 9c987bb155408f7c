"""Choice of ranks from spectra: by tolerance or by bytes.

A bond's singular value is kept while its square exceeds the price of one more rank there; one price per byte holds for
all bonds and is bisected (the threshold of iterative singular value thresholding, 2507.09428, with byte costs).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from math import log2, prod

import numpy as np
from torch import Tensor

from tensornet_compress.coding import FloatFormat, NumberFormat, format_nbytes
from tensornet_compress.decompose.spectra import tails
from tensornet_compress.errors import TensorNetError
from tensornet_compress.tensor import Layout, Topology

_BISECTIONS = 26


def ranks_for_error(
    spectra: Sequence[Tensor],
    max_squared_error: float,
    layout: Layout,
    topology: Topology,
    dropped: Sequence[np.ndarray] | None = None,
) -> tuple[int, ...]:
    """The cheapest priced ranks whose dropped squares sum to at most ``max_squared_error`` over all bonds, so that the
    squared error of the decomposition is at most that (Oseledets 2011, theorem 2.2; Grasedyck 2010).

    ``dropped``: the ``tails`` of all spectra, where these are known."""
    drops = dropped or [tails(spectrum).cpu().numpy() for spectrum in spectra]

    def allowed(ranks: tuple[int, ...]) -> bool:
        return float(sum(float(drop[rank]) for drop, rank in zip(drops, ranks))) <= max_squared_error

    # No bond can do with less than what it needs were it the only one that drops anything.
    least = tuple(max(1, int((drop > max_squared_error).sum())) for drop in drops)
    if allowed(least):
        return least
    full = tuple(len(spectrum) for spectrum in spectra)
    ranks = _bisect(spectra, _Costs(layout, topology, None), allowed, cheapest=True) or full
    improved = True
    while improved:
        improved = False
        for bond, rank in enumerate(ranks):
            lower = (*ranks[:bond], rank - 1, *ranks[bond + 1 :])
            if rank > 1 and allowed(lower):
                ranks, improved = lower, True
    return ranks


def ranks_for_bytes(
    spectra: Sequence[Tensor], max_bytes: int, layout: Layout, topology: Topology, fmt: NumberFormat | None = None
) -> tuple[int, ...]:
    """The ranks that drop least, by priced thresholds, within ``max_bytes`` of stored cores and orders.

    Raises:
        TensorNetError: not even rank 1 everywhere fits.
    """
    costs = _Costs(layout, topology, fmt)

    def fits(ranks: tuple[int, ...]) -> bool:
        return costs.nbytes(ranks) <= max_bytes

    ones = (1,) * len(spectra)
    if not fits(ones):
        needed = costs.nbytes(ones)
        raise TensorNetError(f"{max_bytes} bytes cannot hold this network: rank 1 on every bond already takes {needed} bytes")
    ranks = _bisect(spectra, costs, fits, cheapest=False) or ones
    values = [spectrum.tolist() for spectrum in spectra]
    while True:
        gains = []
        for bond, rank in enumerate(ranks):
            higher = (*ranks[:bond], rank + 1, *ranks[bond + 1 :])
            if rank < len(values[bond]) and fits(higher):
                gains.append((values[bond][rank], higher))
        if not gains or max(gains)[0] <= 0:
            return ranks
        ranks = max(gains)[1]


class _Costs:
    """Stored bytes of a network as a function of its ranks, without building a spec each time."""

    def __init__(self, layout: Layout, topology: Topology, fmt: NumberFormat | None):
        self.fmt = fmt or FloatFormat(dtype="fp32")
        self.order_nbytes = layout.order_nbytes
        self.edges = topology.edges
        labels = [topology.core_labels(core) for core in range(len(topology.legs))]
        # An axis is either a fixed size or, written as ~bond, the rank of a bond.
        self.axes = [[~int(x[1:]) if x[0] == "b" else layout.dims[int(x[1:])] for x in names] for names in labels]
        self._cores: dict[tuple[int, ...], int] = {}
        self._known: dict[tuple[int, ...], int] = {}
        self._worths: dict[tuple[int, ...], list[float]] = {}

    def shapes(self, ranks: Sequence[int]) -> list[tuple[int, ...]]:
        return [tuple([ranks[~axis] if axis < 0 else axis for axis in axes]) for axes in self.axes]

    def nbytes(self, ranks: tuple[int, ...]) -> int:
        if ranks not in self._known:
            shapes = self.shapes(ranks)
            for shape in shapes:
                if shape not in self._cores:
                    self._cores[shape] = format_nbytes(self.fmt, shape)
            self._known[ranks] = self.order_nbytes + sum(map(self._cores.__getitem__, shapes))
        return self._known[ranks]

    def per_rank(self, ranks: tuple[int, ...]) -> list[float]:
        """Of every bond the numbers that one unit of its rank takes."""
        if ranks not in self._worths:
            sizes = [prod(shape) for shape in self.shapes(ranks)]
            self._worths[ranks] = [(sizes[a] + sizes[b]) / rank for (a, b), rank in zip(self.edges, ranks)]
        return self._worths[ranks]


def _bisect(
    spectra: Sequence[Tensor], costs: _Costs, allowed: Callable[[tuple[int, ...]], bool], cheapest: bool
) -> tuple[int, ...] | None:
    """Bisect the price: the cheapest allowed ranks (largest price), or the richest allowed ones (smallest price)."""
    squares = [spectrum.square().flip(0).tolist() for spectrum in spectra]
    largest = max((square[-1] for square in squares), default=0.0)
    if largest == 0.0:
        return (1,) * len(spectra)
    best: tuple[int, ...] | None = None
    low, high = -60.0, log2(largest)
    ranks = tuple(max(1, len(spectrum) // 2) for spectrum in spectra)
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        for _ in range(2):
            ranks = _threshold(squares, costs, ranks, 2.0**middle)
        fits = allowed(ranks)
        if fits:
            best = ranks
        if fits == cheapest:
            low = middle
        else:
            high = middle
    return best


def _threshold(squares: Sequence[list[float]], costs: _Costs, ranks: tuple[int, ...], price: float) -> tuple[int, ...]:
    """Ranks kept at a price per number, with the numbers per unit of rank as they are at ``ranks``."""
    worths = zip(squares, costs.per_rank(ranks))
    return tuple([max(1, len(square) - bisect_right(square, price * worth)) for square, worth in worths])
