"""Two cores whose first one holds the identity: a matrix as combinations of some of its own rows (PIFA, 2501.19090)."""

from __future__ import annotations

import numpy as np
import scipy.linalg
import torch
from torch import Tensor

from tensornet_compress.errors import TensorNetError
from tensornet_compress.metric import KroneckerMetric

_RIDGE = 1e-6


def stable_pivots(left: Tensor, growth: float = 2.0) -> tuple[Tensor, Tensor]:
    """Rows ``p`` of ``left`` (m, r), of full column rank, and ``B`` (m, r), float64, with ``left = B left[p]``.

    No entry of B exceeds ``growth`` in size, so that rounding is not amplified. QR with column pivoting of the transpose comes
    near; while an entry exceeds the bound, its row takes the place of the pivot that it belongs to, which multiplies the volume
    of the pivots by that entry (maxvol: Goreinov et al. 2010, "How to find a good submatrix"), and so must come to an end.

    Returns:
        Pivots, int64 (r,), ascending, and B with the identity at them.

    Raises:
        TensorNetError: ``growth`` below 1, fewer rows than columns, or columns that depend on each other.
    """
    rows, rank = left.shape
    if not growth >= 1 or rows < rank:
        raise TensorNetError(
            f"pivots need growth of at least 1 and no more columns than rows, were given {growth}, {rows} x {rank}"
        )
    work = left.detach().double().cpu()
    triangle, order = scipy.linalg.qr(work.T.numpy(), mode="r", pivoting=True)
    diagonal = np.abs(np.diagonal(triangle))
    if not diagonal[-1] > 1e-13 * diagonal[0]:
        raise TensorNetError(f"a core of shape ({rows}, {rank}) has columns that depend on each other; lower the rank")
    pivots = torch.from_numpy(order[:rank].astype(np.int64))
    combined = _combined(work, pivots)
    while True:
        row, column = divmod(int(combined.abs().argmax()), rank)
        largest = combined[row, column].clone()
        # A bound of exactly one would go on swapping equal volumes, which differ by rounding.
        if float(largest.abs()) <= max(growth, 1 + 1e-9):
            break
        change = combined[row].clone()
        change[column] -= 1
        combined -= torch.outer(combined[:, column] / largest, change)
        pivots[column] = row
    pivots = pivots.sort().values
    combined = _combined(work, pivots)
    combined[pivots] = torch.eye(rank, dtype=combined.dtype)
    return pivots, combined


def _combined(left: Tensor, pivots: Tensor) -> Tensor:
    return torch.linalg.solve(left[pivots], left, left=False)


def refit_rows(matrix: Tensor, combined: Tensor, right: Tensor, metric: KroneckerMetric) -> Tensor:
    """``combined`` (m, r) corrected so that ``combined @ right`` comes nearest to ``matrix`` (m, n) in the column metric, for a
    right core (r, n) that was rounded; float64. What calibration barely sees is left as it was."""
    right = right.double()
    columns = KroneckerMetric(columns=metric.columns)
    weighted = columns.apply(right)
    gram = weighted @ right.T
    level = float(gram.diagonal().mean())
    if level <= 0:
        return combined
    rest = matrix.double() - combined @ right
    gram = gram + _RIDGE * level * torch.eye(len(gram), dtype=gram.dtype)
    return combined + torch.linalg.solve(gram, weighted @ rest.T).T
