"""Metrics of many units at once: a small positive definite matrix (width, width) for each, errors of units independent."""

from __future__ import annotations

import torch
from torch import Tensor


def symmetric_roots(metric: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric square roots of positive definite matrices (units, width, width), and their inverses; fp64."""
    values, frames = torch.linalg.eigh(metric.double())
    roots = values.clamp_min(1e-12 * float(values.max()) + 1e-30).sqrt()[:, None]
    return (frames * roots) @ frames.mT, (frames / roots) @ frames.mT


def whiten(covariance: Tensor, metric_root: Tensor) -> Tensor:
    """Covariance (n, n) of vectors -> covariance of the same weighted by ``metric_root`` (units, width, width)."""
    units, width, _ = metric_root.shape
    blocks = covariance.view(units, width, units, width)
    half = torch.einsum("uab,ubvc->uavc", metric_root, blocks)
    full = torch.einsum("uavc,vcd->uavd", half, metric_root).reshape(len(covariance), -1)
    return (full + full.T) / 2


def ridged(blocks: Tensor, within: float, across: float = 1e-3) -> Tensor:
    """Matrices (units, width, width) with, on the diagonal, ``within`` of the unit's own mean curvature and ``across`` of all
    units' mean added."""
    own = blocks.diagonal(dim1=-2, dim2=-1).mean(-1)
    ridge = within * own + across * own.mean() + 1e-30
    return blocks + ridge[:, None, None] * torch.eye(blocks.shape[-1], dtype=blocks.dtype)
