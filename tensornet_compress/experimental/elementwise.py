"""Two cores in the elementwise metric: alternating weighted least squares, for which no closed form exists."""

from __future__ import annotations

import torch
from torch import Tensor

from tensornet_compress.decompose import matrix_spectrum
from tensornet_compress.decompose.linalg import require_finite
from tensornet_compress.errors import TensorNetError
from tensornet_compress.metric import ElementwiseMetric

_CHUNK_NUMBERS = 1 << 24
# Below it a ridge relative to the level would leave the range of double precision.
_NO_WEIGHT = 1e-290


def weighted_cores(
    matrix: Tensor, metric: ElementwiseMetric, rank: int, sweeps: int = 20, tolerance: float = 1e-6
) -> tuple[Tensor, Tensor, list[float]]:
    """Cores (m, rank) and (rank, n) that lower ``sum F_ij (W - A B)_ij^2``, and the error at the start and after each sweep.

    Starts from the closed form of the nearest separable metric; every half sweep solves its core exactly (r x r normal
    equations for each row or column), so that the error never rises. Ends when a sweep gains less than ``tolerance``.

    Raises:
        TensorNetError: a rank that the matrix cannot have, or a metric of another shape.
    """
    require_finite(matrix, "weight")
    if metric.weights.shape != matrix.shape or not 1 <= rank <= min(matrix.shape):
        raise TensorNetError(
            f"a matrix {tuple(matrix.shape)} at rank {rank} does not fit an elementwise metric {tuple(metric.weights.shape)}"
        )
    wide, weights = matrix.double(), metric.weights.double()
    left, right = (core.double() for core in matrix_spectrum(wide, metric.separable()).cores(rank))
    errors = [metric.norm2(wide - left @ right)]
    for _ in range(sweeps):
        left = _solve_rows(wide, weights, right)
        right = _solve_rows(wide.T, weights.T, left.T).T
        errors.append(metric.norm2(wide - left @ right))
        if errors[-2] - errors[-1] <= tolerance * errors[-2]:
            break
    scale = (left.norm() / right.norm().clamp_min(1e-300)).sqrt().clamp_min(1e-150)
    return (left / scale).to(matrix.dtype), (right * scale).to(matrix.dtype), errors


def _solve_rows(matrix: Tensor, weights: Tensor, basis: Tensor) -> Tensor:
    """For each row w with weights f: the coefficients c (rank,) of least ``sum f (w - c basis)^2``; float64 (rows, rank)."""
    rank, columns = basis.shape
    step = max(1, _CHUNK_NUMBERS // (rank * max(rank, columns)))
    solved = []
    for start in range(0, len(matrix), step):
        weighted = weights[start : start + step, None, :] * basis
        gram = weighted @ basis.T
        level = gram.diagonal(dim1=1, dim2=2).mean(1)
        # A row without weight costs nothing whatever it holds: the ridge alone makes it zero.
        level = torch.where(level > _NO_WEIGHT, level, 1.0)
        gram = gram + 1e-10 * level[:, None, None] * torch.eye(rank, dtype=gram.dtype, device=gram.device)
        solved.append(torch.linalg.solve(gram, (weighted @ matrix[start : start + step, :, None])[..., 0]))
    return torch.cat(solved)
