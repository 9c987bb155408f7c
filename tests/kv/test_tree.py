"""The tree: exact up to coefficient quantisation, spectra that agree with a dense eigendecomposition, groups by information."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tensornet_compress.kv.profile.tree import SideTree, build_tree
from tensornet_compress.metric.blocks import whiten

UNITS, WIDTH = 6, 8


def covariance_of_pairs(pairs: list[tuple[int, int]], seed: int = 0) -> Tensor:
    """Units that share a signal in pairs, and nothing else."""
    generator = torch.Generator().manual_seed(seed)
    factor = torch.zeros(UNITS * WIDTH, len(pairs) * WIDTH)
    for place, pair in enumerate(pairs):
        for unit in pair:
            turn = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=generator))[0]
            factor[unit * WIDTH : (unit + 1) * WIDTH, place * WIDTH : (place + 1) * WIDTH] = turn
    return factor @ factor.T + 0.01 * torch.eye(UNITS * WIDTH)


def metric_roots(seed: int = 0) -> Tensor:
    """Random symmetric positive definite matrices."""
    draws = torch.randn(UNITS, WIDTH, WIDTH, generator=torch.Generator().manual_seed(seed))
    return draws @ draws.mT / WIDTH + torch.eye(WIDTH)


@pytest.mark.parametrize("joined", [0, 5, 100])
def test_analysis_then_synthesis_is_exact(joined: int) -> None:
    groups = [[0, 3], [1, 4, 5], [2]]
    covariance = covariance_of_pairs([(0, 3), (1, 4), (2, 5)])
    tree = build_tree(covariance, torch.randn(UNITS * WIDTH), metric_roots(), groups, joined)
    states = torch.randn(50, UNITS * WIDTH)
    coefficients = tree.analyse(states)
    assert coefficients.shape == (50, UNITS * WIDTH) == (50, tree.components)
    torch.testing.assert_close(tree.synthesise(coefficients), states, atol=2e-3, rtol=1e-3)


def test_coefficient_errors_cost_what_the_metric_says() -> None:
    roots = metric_roots(3)
    tree = build_tree(covariance_of_pairs([(0, 1), (2, 3), (4, 5)]), torch.zeros(48), roots, [[0, 1, 2], [3, 4, 5]], 6)
    states = torch.randn(40, 48)
    coefficients = tree.analyse(states)
    noise = 0.01 * torch.randn(coefficients.shape)
    moved = (tree.synthesise(coefficients + noise) - states).view(40, UNITS, WIDTH)
    paid = torch.einsum("tuc,ucd->tud", moved, tree.metric_root.float()).square().sum()
    assert paid.item() == pytest.approx(noise.square().sum().item(), rel=0.05)


def test_one_group_of_everything_is_the_dense_spectrum() -> None:
    covariance, roots = covariance_of_pairs([(0, 1), (2, 3), (4, 5)]), metric_roots(1)
    tree = build_tree(covariance, torch.zeros(48), roots, [list(range(UNITS))], 0)
    samples = torch.linalg.cholesky(covariance) @ torch.randn(48, 40_000)
    variance = tree.analyse(samples.T).square().mean(0)
    wanted = torch.linalg.eigvalsh(whiten(covariance, roots)).flip(0)
    torch.testing.assert_close(variance[:10], wanted[:10], rtol=0.06, atol=0.02)


def test_a_tree_of_one_group_has_no_root() -> None:
    tree = build_tree(torch.eye(48), torch.zeros(48), metric_roots(), [list(range(6))], 4)
    assert isinstance(tree, SideTree)
    assert tree.root is None
