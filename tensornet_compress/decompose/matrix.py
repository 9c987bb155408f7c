"""Two cores in a metric: the closed form of truncation for every Kronecker metric, and its form with pivots.

With pivots the first core holds the identity: the matrix is kept as combinations of some of its own rows (PIFA, 2501.19090).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.linalg
import torch
from torch import Tensor

from tensornet_compress.decompose.lapack import eigenvalues
from tensornet_compress.decompose.linalg import fix_signs, require_finite
from tensornet_compress.errors import TensorNetError
from tensornet_compress.metric import KroneckerMetric

_RIDGE = 1e-6
_ROWS = 1 << 13
# Largest square over the median beyond which products are made in double precision.
_APART = 1e5


@dataclass(frozen=True)
class MatrixSpectrum:
    """The whitened factorisation of one (m, n) matrix, computed once and good for every rank.

    ``squares`` (k,) are the squared singular values of ``L' W C^(1/2)``, descending: dropping one pays exactly its value in the
    metric. ``left`` (m, k) are the left singular vectors, or the first of them.
    """

    matrix: Tensor
    metric: KroneckerMetric
    squares: Tensor
    left: Tensor

    def error(self, rank: int) -> float:
        """Squared error in the metric at a rank."""
        return float(self.squares[rank:].sum())

    def divergences(self) -> Tensor:
        """What dropping each singular value costs in nats per token, float64 (k,), descending.

        Raises:
            TensorNetError: the metric knows nothing of the loss (no ``rate``).
        """
        if self.metric.rate is None:
            raise TensorNetError("this metric was made without gradients, so an error has no divergence; collect kronecker")
        return self.metric.rate * self.squares

    def cores(self, rank: int) -> tuple[Tensor, Tensor]:
        """Cores (m, rank) and (rank, n) of the best approximation; the first is orthonormal in the row metric."""
        kept = self.left[:, :rank]
        right = self._right_core(kept)
        return self.metric.left_unwhiten(kept).to(self.matrix.dtype), right.to(self.matrix.dtype)

    def shrunk(self, factors: Tensor) -> Tensor:
        """The matrix with each singular value in the metric times its factor (k,); shape (m, n), dtype of the matrix."""
        kept = factors.nonzero().flatten()
        left = self.left[:, kept]
        shrunk = self.metric.left_unwhiten(left * factors[kept].double()) @ self._right_core(left)
        return shrunk.to(self.matrix.dtype)

    def _right_core(self, left: Tensor) -> Tensor:
        """``U' L' W`` of some left vectors (m, r): to bring these out of the whitened space is cheaper than W into it."""
        return self.metric.left_whiten_adjoint(left).T @ self.matrix.double()


def matrix_spectrum(matrix: Tensor, metric: KroneckerMetric, most: int | None = None) -> MatrixSpectrum:
    """Factorise an (m, n) float matrix in a metric (SVD-LLM 2403.07378 for the input moment; KFAC-SVD with both factors).

    Works from the eigenvectors of ``L' W C W' L`` in float64, which needs no inverse of the input moment; for tall matrices
    from the smaller Gram matrix. ``most`` bounds the ranks that cores are asked for, which saves time.
    """
    require_finite(matrix, "weight")
    rows, columns = matrix.shape
    if rows <= 2 * columns:
        values, vectors = torch.linalg.eigh(metric.gram(matrix))
        squares, left = values.flip(0).clamp_min(0), vectors.flip(1)
    else:
        whitened = metric.left_whiten(matrix.double())
        root = _column_root(metric, columns)
        values, vectors = torch.linalg.eigh(root.T @ (whitened.T @ whitened) @ root)
        squares = values.flip(0).clamp_min(0)
        left = torch.linalg.qr(whitened @ (root @ vectors.flip(1)[:, :most])).Q
    left, _ = fix_signs(left, left.T)
    keep = min(rows, columns)
    return MatrixSpectrum(matrix, metric, squares[:keep], left[:, : keep if most is None else min(keep, most)])


def squared_singular_values(matrix: Tensor, metric: KroneckerMetric) -> Tensor:
    """``matrix_spectrum(...).squares`` alone, at a fraction of the time: float64 (min(m, n),), descending. Computed in the
    matrix's own precision; in double where the largest is so far above the others that single precision would drown these."""
    level = 1.0 if metric.rows is None else float(metric.rows.abs().max()) or 1.0
    # Fisher information is so small in some layers that single precision would not hold its products.
    metric = metric if metric.rows is None else KroneckerMetric(metric.rows / level, metric.columns)
    squares = _squares(matrix, metric, torch.promote_types(matrix.dtype, torch.float32))
    if matrix.dtype != torch.float64 and float(squares[0]) > _APART * float(squares.median()):
        squares = _squares(matrix, metric, torch.float64)
    return squares * level


def _squares(matrix: Tensor, metric: KroneckerMetric, dtype: torch.dtype) -> Tensor:
    rows, columns = matrix.shape
    if rows <= columns:
        whitened = metric.left_whiten(matrix.to(dtype))
        gram = whitened @ metric.apply_columns(whitened).T
    else:
        gram = _row_gram(matrix, metric, dtype).to(dtype)
        if metric.columns is not None and metric.columns.ndim == 1:
            root = metric.columns.sqrt().to(dtype)
            gram = root[:, None] * gram * root
        elif metric.columns is not None:
            moment = metric.columns.double()
            ridge = _RIDGE**2 * float(moment.diagonal().mean()) * torch.eye(columns, dtype=moment.dtype)
            root, failed = torch.linalg.cholesky_ex(moment + ridge)
            # Fewer tokens than inputs leave a moment that is singular to rounding.
            root = (_column_root(metric, columns) if int(failed) else root).to(dtype)
            gram = root.T @ gram @ root
    return torch.from_numpy(eigenvalues(gram.contiguous().numpy())).double().flip(0).clamp_min(0)


def _row_gram(matrix: Tensor, metric: KroneckerMetric, dtype: torch.dtype) -> Tensor:
    """``W' R W``, float64 (n, n), from products in ``dtype``, some rows at a time where rows are weighed one by one."""
    if metric.rows is not None and metric.rows.ndim == 2:
        whitened = metric.left_whiten(matrix.to(dtype))
        return (whitened.T @ whitened).double()
    gram = torch.zeros(matrix.shape[1], matrix.shape[1], dtype=torch.float64)
    weights = [None] * len(matrix) if metric.rows is None else metric.rows.double().sqrt().to(dtype).split(_ROWS)
    for part, weight in zip(matrix.split(_ROWS), weights):
        whitened = part.to(dtype) if weight is None else weight[:, None] * part.to(dtype)
        gram += whitened.T @ whitened
    return gram


def _column_root(metric: KroneckerMetric, columns: int) -> Tensor:
    if metric.columns is None:
        return torch.eye(columns, dtype=torch.float64)
    if metric.columns.ndim == 1:
        return metric.columns.double().sqrt().diag()
    values, vectors = torch.linalg.eigh(metric.columns.double())
    return vectors * values.clamp_min(0).sqrt()


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
    weighted = metric.apply_columns(right)
    gram = weighted @ right.T
    level = float(gram.diagonal().mean())
    if level <= 0:
        return combined
    rest = matrix.double() - combined @ right
    gram = gram + _RIDGE * level * torch.eye(len(gram), dtype=gram.dtype)
    return combined + torch.linalg.solve(gram, weighted @ rest.T).T
