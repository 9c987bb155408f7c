"""Metrics of many units: roots and whitening as dense matrices give them."""

from __future__ import annotations

import torch

from tensornet_compress.metric.blocks import ridged, symmetric_roots, whiten


def metrics(units: int = 3, width: int = 4) -> torch.Tensor:
    draws = torch.randn(units, width, width, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return draws @ draws.mT + 0.1 * torch.eye(width)


def test_roots_are_symmetric_and_inverse_to_each_other() -> None:
    roots, inverse = symmetric_roots(metrics())
    torch.testing.assert_close(roots @ roots, metrics())
    torch.testing.assert_close(roots, roots.mT)
    torch.testing.assert_close(roots @ inverse, torch.eye(4, dtype=torch.float64).expand(3, -1, -1))


def test_whitening_is_a_product_with_the_block_diagonal_root() -> None:
    factor = torch.randn(12, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    dense = torch.block_diag(*symmetric_roots(metrics())[0])
    torch.testing.assert_close(whiten(factor @ factor.T, symmetric_roots(metrics())[0]), dense @ factor @ factor.T @ dense)


def test_a_ridge_is_a_share_of_the_units_own_curvature_and_of_all() -> None:
    blocks = torch.stack([torch.diag(torch.tensor([2.0, 0.0])), torch.diag(torch.tensor([6.0, 0.0]))])
    wanted = torch.tensor([[2.102, 0.102], [6.302, 0.302]])
    torch.testing.assert_close(ridged(blocks, 0.1).diagonal(dim1=-2, dim2=-1), wanted)
