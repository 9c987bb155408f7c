"""Truncation in the elementwise metric: against the closed form where one exists, against gradient descent where not."""

import pytest
import torch

from tensornet_compress.coding import parse_format
from tensornet_compress.decompose import matrix_spectrum, realise, refine_cores
from tensornet_compress.errors import TensorNetError
from tensornet_compress.experimental import weighted_cores
from tensornet_compress.metric import ElementwiseMetric, KroneckerMetric
from tensornet_compress.tensor import Layout, NetworkSpec, TermSpec, Topology, contract_term
from tests.generators import decaying_tensor, random_tensor


def test_separable_weights_have_the_closed_form():
    matrix = random_tensor((12, 9))
    rows, columns = random_tensor((12,), 1).square() + 0.1, random_tensor((9,), 2).square() + 0.1
    left, right, errors = weighted_cores(matrix, ElementwiseMetric(rows[:, None] * columns), 3)
    best = matrix_spectrum(matrix, KroneckerMetric(rows, columns)).error(3)
    assert errors[-1] == pytest.approx(best, rel=1e-8)
    a, b = matrix_spectrum(matrix, KroneckerMetric(rows, columns)).cores(3)
    torch.testing.assert_close(left @ right, a @ b, rtol=1e-6, atol=1e-8)


def test_iteration_beats_its_start_and_never_rises():
    matrix, weights = random_tensor((20, 16)), random_tensor((20, 16), 3).square()
    metric = ElementwiseMetric(weights)
    _, _, errors = weighted_cores(matrix, metric, 4)
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.9 * errors[0]
    plain = matrix_spectrum(matrix, KroneckerMetric())
    left, right = plain.cores(4)
    assert errors[-1] < metric.norm2(matrix - left @ right)


def test_an_exact_low_rank_matrix_is_found():
    matrix = random_tensor((10, 3)) @ random_tensor((3, 12), 1)
    left, right, _ = weighted_cores(matrix, ElementwiseMetric(random_tensor((10, 12), 2).square() + 0.01), 3)
    torch.testing.assert_close(left @ right, matrix, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("level", [0.0, 1e-300])
@pytest.mark.parametrize("where", [(0, slice(None)), (slice(None), slice(2, 4))])
def test_rows_and_columns_without_weight_cost_nothing(where, level):
    matrix, weights = random_tensor((12, 9)), random_tensor((12, 9), 1).square() + 0.1
    weights[where] = level
    metric = ElementwiseMetric(weights)
    left, right, errors = weighted_cores(matrix, metric, 3)
    assert torch.isfinite(left @ right).all()
    assert errors == sorted(errors, reverse=True)
    assert metric.norm2(matrix - left @ right) == pytest.approx(errors[-1], rel=1e-9)


def test_a_train_is_refined_by_als_in_the_elementwise_metric():
    tensor = decaying_tensor((16, 16), 4)
    layout = Layout.of(((4, 4), (4, 4)), shape=(16, 16))
    metric = ElementwiseMetric(random_tensor((16, 16), 5).square())
    term = TermSpec(layout=layout, topology=Topology.train(4), ranks=(3, 4, 3), formats=(parse_format("fp32"),) * 4)
    network = realise(tensor, NetworkSpec(shape=(16, 16), dtype="float64", terms=(term,)))
    cores = network.cores(dtype=torch.float64)
    refined, errors = refine_cores(cores, term, tensor, metric, sweeps=4)
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.9 * errors[0]
    assert metric.norm2(tensor - contract_term(term, refined)) == pytest.approx(errors[-1], rel=1e-6)


def test_bad_weights_and_ranks_are_refused():
    with pytest.raises(TensorNetError, match="finite non-negative"):
        ElementwiseMetric(-torch.ones(2, 2))
    with pytest.raises(TensorNetError, match="rank 9"):
        weighted_cores(torch.ones(4, 4), ElementwiseMetric(torch.ones(4, 4)), 9)
