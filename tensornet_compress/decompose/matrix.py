"""Two cores in a metric: the closed form of truncation for every Kronecker metric."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tensornet_compress.decompose.linalg import fix_signs, require_finite
from tensornet_compress.errors import TensorNetError
from tensornet_compress.metric import KroneckerMetric


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


def _column_root(metric: KroneckerMetric, columns: int) -> Tensor:
    if metric.columns is None:
        return torch.eye(columns, dtype=torch.float64)
    if metric.columns.ndim == 1:
        return metric.columns.double().sqrt().diag()
    values, vectors = torch.linalg.eigh(metric.columns.double())
    return vectors * values.clamp_min(0).sqrt()
