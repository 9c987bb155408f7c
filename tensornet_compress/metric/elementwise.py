"""The full diagonal Fisher metric: one weight per entry of a matrix. No closed-form truncation exists; ALS solves it."""

from __future__ import annotations

import torch
from torch import Tensor

from tensornet_compress.errors import TensorNetError
from tensornet_compress.metric.metric import KroneckerMetric


class ElementwiseMetric:
    """``norm2(E) = sum_ij F_ij E_ij^2`` with ``weights`` F (m, n), non-negative.

    ``rate``: divergence in nats per token and unit of ``norm2``, None when unknown.
    """

    def __init__(self, weights: Tensor, rate: float | None = None):
        if weights.ndim != 2 or not torch.isfinite(weights).all() or bool((weights < 0).any()):
            raise TensorNetError(
                f"an elementwise metric needs finite non-negative weights (m, n), was given shape {tuple(weights.shape)}"
            )
        self.weights = weights
        self.rate = rate

    def apply(self, error: Tensor) -> Tensor:
        """``F * E``, shape (m, n)."""
        return self.weights.to(error.dtype) * error

    def norm2(self, error: Tensor) -> float:
        """Squared norm of an (m, n) error."""
        return float((self.weights.double() * error.double().square()).sum())

    def separable(self) -> KroneckerMetric:
        """The nearest product of row and column weights with the same marginals: where iteration starts."""
        rows, columns = self.weights.double().mean(1), self.weights.double().mean(0)
        level = float(rows.mean())
        if level <= 0:
            raise TensorNetError("an elementwise metric whose weights are all zero measures nothing")
        floor = 1e-9 * level
        return KroneckerMetric(rows.clamp_min(floor), (columns / level).clamp_min(1e-9), rate=self.rate)
