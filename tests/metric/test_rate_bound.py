"""The rate-distortion bound against closed forms."""

import math

import pytest
import torch

from tensornet_compress.metric import KroneckerMetric, euclidean
from tensornet_compress.metric.rate_bound import gaussian_bits


def flat(rows: int, columns: int) -> torch.Tensor:
    """A matrix whose rows and columns all have mean square one."""
    return torch.where(torch.arange(rows * columns).view(rows, columns) % 2 == 0, 1.0, -1.0)


@pytest.mark.parametrize("share", [0.5, 0.1, 0.001])
def test_white_numbers_take_half_a_logarithm_each(share):
    matrix = flat(6, 8)
    wanted = 48 * 0.5 * math.log2(1 / share)
    assert gaussian_bits(matrix, euclidean(), share * 48) == pytest.approx(wanted, rel=1e-6)


def test_an_error_as_large_as_the_matrix_takes_nothing():
    assert gaussian_bits(flat(6, 8), euclidean(), 48.0) == 0.0


def test_water_fills_the_weakest_components_first():
    """Two kinds of rows in the metric: an error below the weaker one is spread evenly, above it the weaker get no bits."""
    metric = KroneckerMetric(rows=torch.tensor([4.0, 4.0, 0.01, 0.01]))
    matrix = flat(4, 8)
    fine = 32 * 0.001
    both = 16 * 0.5 * (math.log2(4 / 0.001) + math.log2(0.01 / 0.001))
    assert gaussian_bits(matrix, metric, fine) == pytest.approx(both, rel=1e-6)
    coarse = 16 * 0.01 + 16 * 1.0
    assert gaussian_bits(matrix, metric, coarse) == pytest.approx(16 * 0.5 * math.log2(4 / 1.0), rel=1e-6)


def test_a_full_column_factor_counts_by_its_spectrum():
    torch.manual_seed(0)
    turn = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64)).Q
    spectrum = torch.logspace(-2, 1, 8, dtype=torch.float64)
    matrix, error = flat(6, 8), 0.06
    diagonal = gaussian_bits(matrix, KroneckerMetric(columns=spectrum), error)
    assert gaussian_bits(matrix, KroneckerMetric(columns=(turn * spectrum) @ turn.T), error) == pytest.approx(
        diagonal, rel=1e-6
    )


def test_rows_of_large_tables_count_in_groups():
    torch.manual_seed(0)
    table = torch.randn(5000, 8) * torch.logspace(-1, 1, 5000)[:, None]
    rows, columns = table.double().square().mean(1), table.double().square().mean(0)
    variance = rows[:, None] * (columns / columns.mean())
    level = float(variance.min()) / 2
    exact = float((0.5 * (variance / level).log2()).sum())
    assert gaussian_bits(table, euclidean(), level * table.numel()) == pytest.approx(exact, rel=1e-3)
