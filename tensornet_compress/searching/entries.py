"""Entry sorts (EinSort, 2606.08565): sort the entries, decompose what is then smooth, and pay for the permutation.

Sorted entries are nearly of rank one, so almost all bytes are the permutation's. Tied groups keep only to which of K groups of
equal size an entry belongs: a permutation source code, which on independent entries can at best equal quantisation with an
entropy coder (0909.0704). Prices are those of packed permutations, ceil(log2) of what has to be told apart.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import Literal

import torch
from torch import Tensor

from tensornet_compress.decompose import svd
from tensornet_compress.decompose.linalg import require_finite
from tensornet_compress.errors import TensorNetError
from tensornet_compress.tensor import permutation_bits

Kind = Literal["global", "row", "block"]
_CORE_BITS = 16


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
