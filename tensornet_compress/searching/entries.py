"""Entry sorts (EinSort, 2606.08565): sort the entries, decompose what is then smooth, and pay for the permutation; and the best
of them under the limit of a search.

Sorted entries are nearly of rank one, so almost all bytes are the permutation's. Tied groups keep only to which of K groups of
equal size an entry belongs: a permutation source code, which on independent entries can at best equal quantisation with an
entropy coder (0909.0704). Prices are those of packed permutations, ceil(log2) of what has to be told apart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import ceil, isfinite
from typing import Any, Literal

import torch
from torch import Tensor

from tensornet_compress.decompose import svd
from tensornet_compress.decompose.linalg import require_finite
from tensornet_compress.errors import TensorNetError
from tensornet_compress.searching.limits import Deadline, Limit
from tensornet_compress.tensor import permutation_bits

Kind = Literal["global", "row", "block"]
Options = dict[str, Any]
"""Arguments of ``sort_entries``."""
_CORE_BITS = 16
_MARGIN = 1.01
_BLOCKS = (16, 64)
_GROUPS = (2, 4, 8, 16, 32, 64)
_RANKS = (1, 2, 4)


@dataclass(frozen=True)
class SortedFit:
    """A matrix stored as sorted entries: ``dense`` is what it decodes to; bits of the order, of signs, of the fp16 cores."""

    dense: Tensor
    order_bits: int
    sign_bits: int
    core_bits: int

    @property
    def nbytes(self) -> int:
        """Everything, in whole bytes."""
        return -(-(self.order_bits + self.sign_bits + self.core_bits) // 8)


def sort_entries(
    matrix: Tensor, kind: Kind = "row", *, size: int = 0, groups: int = 0, rank: int = 1, nonnegative: bool = False
) -> SortedFit:
    """Sort the entries of a matrix (m, n), keep the best rank-``rank`` approximation of the sorted matrix, and put it back.

    Args:
        kind: ``global`` (all entries together), ``row`` (each row alone) or ``block`` (runs of ``size`` entries of each row).
        groups: with ``K > 0`` entries keep only which of K equal groups of their run they fall in (K must divide the run).
        rank: of the sorted matrix. nonnegative: sort magnitudes and store one sign bit an entry; cores are then
            non-negative up to rounding, and their gauge is fixed by giving both factors equal norms.

    Raises:
        TensorNetError: bad input, or a block or group size that does not divide.
    """
    require_finite(matrix, "matrix")
    if matrix.ndim != 2:
        raise TensorNetError(f"entry sorts take a matrix, was given shape {tuple(matrix.shape)}")
    if kind not in ("global", "row", "block"):
        raise TensorNetError(f"unknown kind {kind!r}; choose global, row or block")
    rows, columns = matrix.shape
    run = {"global": rows * columns, "row": columns, "block": size}[kind]
    if run < 1 or (rows * columns) % run or (kind == "block" and columns % run):
        raise TensorNetError(f"blocks of {size} entries do not divide rows of {columns}")
    if groups < 0 or (groups and run % groups):
        raise TensorNetError(f"{groups} groups do not divide a run of {run} entries")
    values = matrix.float()
    magnitudes = values.abs() if nonnegative else values
    runs = magnitudes.reshape(-1, run)
    ordered, order = runs.sort(1)
    # What the order still tells apart: all entries of a run, or only its groups.
    told = permutation_bits(run) - (groups * permutation_bits(run // groups) if groups else 0.0)
    order_bits = len(runs) * ceil(told)
    grid = ordered.reshape(rows, columns) if kind != "block" else ordered
    if groups:
        ordered = ordered.reshape(len(runs), groups, -1).mean(2)
        grid = ordered if kind != "global" else ordered.reshape(_near_square(groups), -1)
    rank = min(rank, *grid.shape)
    left, singular, right = svd(grid)
    root = singular[:rank].sqrt()
    factors = [(left[:, :rank] * root).half().float(), (root[:, None] * right[:rank]).half().float()]
    fitted = (factors[0] @ factors[1]).reshape(ordered.shape)
    if groups:
        fitted = fitted.repeat_interleave(run // groups, 1)
    back = torch.empty_like(runs).scatter_(1, order, fitted.reshape(runs.shape)).reshape(matrix.shape)
    dense = back * values.sign() if nonnegative else back
    core_bits = _CORE_BITS * sum(f.numel() for f in factors)
    return SortedFit(dense, order_bits, rows * columns if nonnegative else 0, core_bits)


def _near_square(count: int) -> int:
    """The largest divisor not above the square root."""
    return next(d for d in range(int(count**0.5), 0, -1) if count % d == 0)


def entropy_coded(matrix: Tensor, step: float) -> tuple[Tensor, int]:
    """Uniform rounding with one step for the matrix and an ideal order-0 entropy coder: what it decodes to, and bits, the
    table of counts (32 bits a used symbol) included."""
    codes = (matrix.float() / step).round()
    _, counts = codes.unique(return_counts=True)
    share = counts.double() / counts.sum()
    bits = float(-(counts.double() * share.log2()).sum())
    return codes * step, ceil(bits) + 32 * len(counts) + 32


@dataclass(frozen=True)
class EntrySort:
    """A measured entry sort: ``error`` is relative, in the metric of the search; ``nbytes`` has permutation, signs and cores.

    ``options`` are those of ``sort_entries``, which makes it again. It is a figure to compare with: a
    permutation of entries is no layout, so it cannot be stored or run as a ``TensorNetwork``.
    """

    options: Options
    nbytes: int
    error: float
    order_nbytes: int

    def describe(self) -> str:
        """One line."""
        given = ", ".join(f"{name}={value}" for name, value in self.options.items())
        return f"entry sort ({given}): {self.nbytes:,} bytes, {self.order_nbytes:,} of them the order, error {self.error:.3g}"


def entry_sorts(tensor: Tensor, error_of: Callable[[Tensor], float], limit: Limit, deadline: Deadline) -> list[EntrySort]:
    """Entry sorts of a tensor as a matrix (first axis, all others) that keep a limit; ``error_of`` measures what is decoded."""
    matrix = tensor.reshape(tensor.shape[0], -1)
    if tensor.ndim < 2 or min(matrix.shape) < 2:
        return []
    sorts = []
    for options in _kinds(matrix.shape[1]):
        if deadline.passed():
            break
        fit = sort_entries(matrix, **options)
        # A sort whose permutation alone is too large need not be decoded.
        if not limit.allows(0.0, fit.nbytes):
            continue
        error = error_of(fit.dense.reshape(tensor.shape))
        # Cores are fp16, which large numbers overflow.
        if isfinite(error) and limit.allows(error, fit.nbytes):
            sorts.append(EntrySort(options, fit.nbytes, error, -(-(fit.order_bits + fit.sign_bits) // 8)))
    return sorts


def entry_verdict(best: EntrySort | None, gain: float, luck: float) -> str:
    """What a search says of its best entry sort: ``gain`` is the network's cost over the sort's, ``luck`` the same on shuffled
    entries, 0 where no sort kept the limit."""
    if best is None:
        return "no entry sort that was tried keeps the limit"
    figures = f"cost of the network over the sort's {gain:.3f}, {luck:.3f} on shuffled entries"
    if gain <= _MARGIN:
        return f"no entry sort beats it ({figures})"
    if gain <= _MARGIN * luck:
        return f"the best entry sort gains no more than on shuffled entries ({figures})"
    return f"an entry sort would win, but cannot be stored as a network ({figures})"


def _kinds(columns: int) -> Iterator[Options]:
    for signs in (False, True):
        extra = {"nonnegative": True} if signs else {}
        yield {"kind": "global", "rank": 2} | extra
        for rank in _RANKS:
            yield {"kind": "row", "rank": rank} | extra
        for size in _BLOCKS:
            if columns % size == 0:
                yield {"kind": "block", "size": size} | extra
        for groups in _GROUPS:
            if columns % groups == 0 and groups < columns:
                yield {"kind": "row", "groups": groups} | extra
