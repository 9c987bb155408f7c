"""How many bits a Gaussian source of a matrix's variances would need for an error: the rate-distortion bound in a metric."""

from __future__ import annotations

import torch
from torch import Tensor

from tensornet_compress.metric.metric import KroneckerMetric

_ROW_GROUPS, _HALVINGS = 1024, 80


def gaussian_bits(matrix: Tensor, metric: KroneckerMetric, error: float) -> float:
    """Least bits for a matrix (m, n) of independent normal entries, if ``error`` is its squared error in the metric.

    The variance of an entry is the product of what its row and its column have in the given matrix. In the metric the entries
    are rotated to independent components, and reverse water-filling gives each ``1/2 log2(variance / level)`` bits, those below
    the level none. No code for such a source does better; numbers that are not normal may.

    Args:
        metric: with a diagonal row factor, or none.
    """
    components, count = _components(matrix, metric)
    total = float((components * count).sum())
    if error >= total:
        return 0.0
    low, high = torch.zeros((), dtype=torch.float64), components.max()
    for _ in range(_HALVINGS):
        level = (low + high) / 2
        if float((components.clamp_max(level) * count).sum()) < error:
            low = level
        else:
            high = level
    return float((0.5 * (components / high).clamp_min(1).log2() * count).sum())


def _components(matrix: Tensor, metric: KroneckerMetric) -> tuple[Tensor, Tensor]:
    """Variances of the components in the metric, float64 (groups of rows, n), and how many rows each stands for (groups, 1)."""
    squares = matrix.double().square()
    rows, columns = squares.mean(1), squares.mean(0) / squares.mean().clamp_min(1e-300)
    if metric.rows is not None:
        rows = rows * metric.rows.double()
    if metric.columns is None:
        spectrum = columns
    elif metric.columns.ndim == 1:
        spectrum = columns * metric.columns.double()
    else:
        root = columns.sqrt()
        spectrum = torch.linalg.eigvalsh(root[:, None] * metric.columns.double() * root).clamp_min(0)
    # Rows of nearly one variance count together, so that large tables take no more memory than layers.
    groups = rows.sort().values.chunk(_ROW_GROUPS)
    count = torch.tensor([[len(group)] for group in groups], dtype=torch.float64)
    return torch.stack([group.mean() for group in groups])[:, None] * spectrum, count
