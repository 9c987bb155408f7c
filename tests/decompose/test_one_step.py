"""One step in the metric: the error it promises, at fewer bits than other roundings, and nothing lost on the way to bytes."""

from __future__ import annotations

import importlib
import pkgutil

import numpy as np
import pytest
import torch
from numba.core.dispatcher import Dispatcher
from torch import Tensor

import tensornet_compress.coding
import tensornet_compress.searching
from tensornet_compress.coding.coded_matrix import CodedMatrix
from tensornet_compress.decompose import one_step
from tensornet_compress.decompose.one_step import NATS_PER_ENTRY, Canceller, row_weights
from tensornet_compress.metric import KroneckerMetric


def problem(rows: int = 60, n: int = 90, seed: int = 0) -> tuple[Tensor, KroneckerMetric]:
    """A matrix and a metric of correlated inputs and unequal outputs, in nats."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(n, 3 * n, generator=generator) * torch.linspace(0.2, 3, n)[:, None]
    mixed += 2 * torch.randn(1, 3 * n, generator=generator)
    moment = (mixed @ mixed.T / (3 * n)).double()
    fisher = torch.rand(rows, generator=generator, dtype=torch.float64) + 0.1
    return torch.randn(rows, n, generator=generator), KroneckerMetric(fisher, moment, rate=0.5)


def loss(matrix: Tensor, coded: CodedMatrix, metric: KroneckerMetric) -> float:
    """Divergence of the coded matrix in nats."""
    assert metric.rate is not None
    return metric.rate * metric.norm2(matrix.double() - torch.from_numpy(coded.to_dense()).double())


@pytest.mark.parametrize("step", [0.02, 0.1])
def test_a_fine_step_costs_what_theory_says(step: float) -> None:
    matrix, metric = problem()
    canceller = Canceller.of(metric.columns, matrix.shape[1], damping=1e-6)
    coded = canceller.codes(matrix, row_weights(metric, len(matrix)), step, slope=0.0)
    assert loss(matrix, coded, metric) == pytest.approx(NATS_PER_ENTRY * step**2 * matrix.numel(), rel=0.1)


def test_bytes_hold_all_of_it() -> None:
    matrix, metric = problem()
    coded = Canceller.of(metric.columns, matrix.shape[1]).codes(matrix, row_weights(metric, len(matrix)), 0.3)
    data = coded.to_bytes()
    again = CodedMatrix.from_bytes(data, *matrix.shape)
    assert np.array_equal(again.codes, coded.codes)
    assert np.array_equal(again.to_dense(), coded.to_dense())
    # Whoever needs the codes no more may have them overwritten.
    assert np.array_equal(again.to_bytes(overwrite=True), data)
    assert 8 * len(data) < coded.bits + 12 * sum(matrix.shape) + 1200


def test_cancelling_beats_rounding_and_weighing_bits_beats_both() -> None:
    matrix, metric = problem(200, 120)
    weights = row_weights(metric, len(matrix))
    canceller = Canceller.of(metric.columns, 120)
    # Rounding in the same metric without regard to what other columns lost: its diagonal alone.
    alone = Canceller.of(metric.columns.diagonal(), 120)  # type: ignore[union-attr]

    def bits_for(loss_wanted: float, of: Canceller, slope: float) -> float:
        low, high = 1e-3, 50.0
        for _ in range(40):
            step = (low * high) ** 0.5
            coded = of.codes(matrix, weights, step, slope)
            low, high = (step, high) if loss(matrix, coded, metric) < loss_wanted else (low, step)
        return coded.bits / matrix.numel()

    wanted = 0.02 * loss(matrix, canceller.codes(matrix, weights, 1e6), metric)
    plain, rounded, aware = (bits_for(wanted, *how) for how in ((alone, 0.0), (canceller, 0.0), (canceller, 0.1155)))
    assert rounded < plain - 0.2
    assert aware < rounded - 0.02


def test_an_error_costs_the_same_in_every_row() -> None:
    matrix, metric = problem(400, 60)
    coded = Canceller.of(metric.columns, 60).codes(matrix, row_weights(metric, 400), 0.2, slope=0.0)
    error = (matrix.double() - torch.from_numpy(coded.to_dense()).double()) @ torch.linalg.cholesky(metric.columns)  # type: ignore[arg-type]
    cost = metric.rows * error.square().sum(1)  # type: ignore[operator]
    quarters = [float(part.mean()) for part in cost[torch.argsort(metric.rows)].split(100)]  # type: ignore[arg-type]
    assert max(quarters) < 1.2 * min(quarters)


@pytest.mark.parametrize("columns", [None, torch.linspace(0.1, 2, 30), torch.eye(30)])
def test_other_metrics_work_too(columns: Tensor | None) -> None:
    matrix = torch.randn(20, 30, generator=torch.Generator().manual_seed(1))
    coded = Canceller.of(columns, 30).codes(matrix, None, 0.01, slope=0.0)
    assert torch.allclose(torch.from_numpy(coded.to_dense()), matrix, atol=0.05)


def test_rows_and_columns_of_zeros_and_single_entries() -> None:
    matrix, metric = problem(12, 10)
    matrix[3], matrix[:, 4] = 0.0, 0.0
    matrix[5, 5] = 1e4
    coded = Canceller.of(metric.columns, 10).codes(matrix, row_weights(metric, 12), 0.05)
    again = CodedMatrix.from_bytes(coded.to_bytes(), 12, 10)
    assert torch.allclose(torch.from_numpy(again.to_dense()), matrix, atol=0.3)
    single = Canceller.of(None, 1).codes(torch.tensor([[0.7]]), None, 0.01)
    assert CodedMatrix.from_bytes(single.to_bytes(), 1, 1).to_dense()[0, 0] == pytest.approx(0.7, abs=0.01)


@pytest.mark.parametrize("states", [0, 8])
@pytest.mark.parametrize("form", ["full", "diagonal", "none"])
def test_losses_are_those_of_the_errors_in_the_metric(form: str, states: int) -> None:
    matrix, metric = problem(40, 90)
    full = metric.columns.double()
    columns = {"full": full, "diagonal": full.diagonal(), "none": None}[form]
    moment = {"full": full, "diagonal": full.diagonal().diag(), "none": torch.eye(90, dtype=torch.float64)}[form]
    canceller = Canceller.of(columns, 90)
    for step in (0.05, 0.5, 3.0):
        coded, losses = canceller.codes_and_losses(matrix, row_weights(metric, 40), step, states=states)
        assert np.array_equal(coded.codes, canceller.codes(matrix, row_weights(metric, 40), step, states=states).codes)
        error = matrix.double() - torch.from_numpy(coded.to_dense()).double()
        assert torch.allclose(losses, ((error @ moment) * error).sum(1), rtol=1e-3)


def test_codes_of_a_few_large_columns_are_what_they_are_alone() -> None:
    matrix = torch.randn(20, 200, generator=torch.Generator().manual_seed(4))
    matrix[:, 150:] *= 1e4
    whole = Canceller.of(None, 200).codes(matrix, None, 0.1, slope=0.0)
    assert np.abs(whole.codes).max() > 1 << 16
    assert np.allclose(whole.to_dense(), matrix, atol=0.11)


def test_a_step_below_the_precision_of_a_row_is_lifted_in_that_row_alone() -> None:
    matrix, weight = torch.randn(6, 40, generator=torch.Generator().manual_seed(2)), torch.ones(6)
    canceller = Canceller.of(None, 40)
    plain = canceller.codes(matrix, weight, 1e-3)
    weight[2] = 1e30
    coded = CodedMatrix.from_bytes(canceller.codes(matrix, weight, 1e-3).to_bytes(), 6, 40)
    dense = torch.from_numpy(coded.to_dense())
    assert torch.allclose(dense[2], matrix[2], atol=1e-6)
    others = [0, 1, 3, 4, 5]
    assert torch.allclose(dense[others], torch.from_numpy(plain.to_dense())[others], atol=1e-3)


def test_columns_take_over_errors_in_single_precision_as_written() -> None:
    rng = np.random.default_rng(0)
    block, coupling = (rng.standard_normal(shape).astype(np.float32) for shape in ((11, 37), (11, 11)))
    exact = block.copy()
    for i in range(len(block)):
        for j in range(0, i - 3, 4):
            lost = [coupling[j + k, i] * exact[j + k] for k in range(4)]
            exact[i] -= lost[0] + lost[1] + lost[2] + lost[3]
        for j in range(i - i % 4, i):
            exact[i] -= coupling[j, i] * exact[j]
        one_step._catch_up(block, coupling, i)
    # Bit for bit: products and sums that the compiler may join or reorder differ between one compilation and the next, and with
    # them all codes after.
    assert np.array_equal(block, exact)


def test_no_compiled_loop_that_makes_bytes_leaves_rounding_to_the_compiler() -> None:
    found = []
    for package in (tensornet_compress.coding, tensornet_compress.decompose, tensornet_compress.searching):
        for info in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
            loops = [value for value in vars(importlib.import_module(info.name)).values() if isinstance(value, Dispatcher)]
            found += [(loop.__module__, loop.__name__, bool(loop.targetoptions.get("fastmath"))) for loop in loops]
    assert ("tensornet_compress.decompose.one_step", "_cancel_in_trellis", False) in found
    assert not [name for name in found if name[-1]]
