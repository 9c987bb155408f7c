"""Ranks of a network from the spectra of the unfoldings that its bonds cut: by tolerance or by bytes.

The spectra are computed once and tell what every choice of ranks loses. A bond's singular value is kept while its square
exceeds the price of one more rank there; one price per byte holds for all bonds and is bisected (the threshold of iterative
singular value thresholding, 2507.09428, with byte costs).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from math import prod

import numpy as np
import torch
from torch import Tensor

from tensornet_compress.bisection import least_kept
from tensornet_compress.coding import FloatFormat, NumberFormat, format_nbytes
from tensornet_compress.decompose.linalg import singular_values
from tensornet_compress.errors import TensorNetError
from tensornet_compress.tensor import Layout, Topology

_BISECTIONS = 26
_LEAST_PRICE = 2.0**-60


def unfolding(laid_out: Tensor, left: Sequence[int]) -> Tensor:
    """The matrix of a tensor with positions ``left`` as rows and the others as columns."""
    rest = [position for position in range(laid_out.ndim) if position not in set(left)]
    rows = prod(laid_out.shape[position] for position in left)
    return laid_out.permute(*left, *rest).reshape(rows, -1)


def bond_spectra(laid_out: Tensor, topology: Topology) -> list[Tensor]:
    """Singular values (float64, descending) of the unfolding at each bond."""
    return [singular_values(unfolding(laid_out, topology.side(bond))) for bond in range(len(topology.edges))]


def tails(spectrum: Tensor) -> Tensor:
    """``tails[r]``: the squared norm that rank ``r`` drops, for r = 0 .. len(spectrum)."""
    squares = spectrum.square().flip(0).cumsum(0).flip(0)
    return torch.cat([squares, squares.new_zeros(1)])


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
    ranks = _priced_ranks(spectra, _Costs(layout, topology, None), allowed, cheapest=True) or full
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
    ranks = _priced_ranks(spectra, costs, fits, cheapest=False) or ones
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


def ranks_nbytes(ranks: tuple[int, ...], layout: Layout, topology: Topology, fmt: NumberFormat | None = None) -> int:
    """Stored bytes of cores and orders as ``ranks_for_bytes`` counts them, of ranks that need not be feasible."""
    return _Costs(layout, topology, fmt).nbytes(ranks)


def feasible_ranks(ranks: Sequence[int], layout: Layout, topology: Topology) -> list[int]:
    """Ranks lowered until no bond of a core exceeds the product of the core's other axes."""
    lowered, dims = list(ranks), layout.dims
    sizes = [prod(dims[position] for position in legs) for legs in topology.legs]
    changed = True
    while changed:
        changed = False
        for core, own in enumerate(sizes):
            bonds = topology.bonds_of(core)
            for bond in bonds:
                limit = own
                for other in bonds:
                    limit *= lowered[other] if other != bond else 1
                if lowered[bond] > limit:
                    lowered[bond], changed = limit, True
    return lowered


class _Costs:
    """Stored bytes of a network as a function of its ranks, without building a spec each time."""

    def __init__(self, layout: Layout, topology: Topology, fmt: NumberFormat | None):
        self.fmt = fmt or FloatFormat(dtype="fp32")
        self.order_nbytes = layout.order_nbytes
        self.edges = topology.edges
        # An axis is either a fixed size or, written as ~bond, the rank of a bond.
        self.axes = [[~int(x[1:]) if x[0] == "b" else layout.dims[int(x[1:])] for x in names] for names in topology.all_labels]
        self._cores: dict[tuple[int, ...], int] = {}
        self._known: dict[tuple[int, ...], int] = {}
        self._worths: dict[tuple[int, ...], list[float]] = {}

    def shapes(self, ranks: Sequence[int]) -> list[tuple[int, ...]]:
        return [tuple([ranks[~axis] if axis < 0 else axis for axis in axes]) for axes in self.axes]

    def nbytes(self, ranks: tuple[int, ...]) -> int:
        if ranks not in self._known:
            self._known[ranks] = self.order_nbytes + sum(format_nbytes(self.fmt, shape) for shape in self.shapes(ranks))
        return self._known[ranks]

    def per_rank(self, ranks: tuple[int, ...]) -> list[float]:
        """Of every bond the numbers that one unit of its rank takes."""
        if ranks not in self._worths:
            sizes = [prod(shape) for shape in self.shapes(ranks)]
            self._worths[ranks] = [(sizes[a] + sizes[b]) / rank for (a, b), rank in zip(self.edges, ranks)]
        return self._worths[ranks]


def _priced_ranks(
    spectra: Sequence[Tensor], costs: _Costs, allowed: Callable[[tuple[int, ...]], bool], cheapest: bool
) -> tuple[int, ...] | None:
    """The cheapest allowed ranks (largest price per number), or the richest allowed ones (smallest price)."""
    squares = [spectrum.square().flip(0).tolist() for spectrum in spectra]
    largest = max((square[-1] for square in squares), default=0.0)
    if largest == 0.0:
        return (1,) * len(spectra)
    best: tuple[int, ...] | None = None
    ranks = tuple(max(1, len(spectrum) // 2) for spectrum in spectra)

    def too_cheap(price: float) -> bool:
        nonlocal best, ranks
        # Twice, as the numbers per unit of rank depend on the ranks themselves.
        for _ in range(2):
            worths = zip(squares, costs.per_rank(ranks))
            ranks = tuple([max(1, len(square) - bisect_right(square, price * worth)) for square, worth in worths])
        fits = allowed(ranks)
        best = ranks if fits else best
        return fits != cheapest

    least_kept(too_cheap, _LEAST_PRICE, largest, steps=_BISECTIONS)
    return best
