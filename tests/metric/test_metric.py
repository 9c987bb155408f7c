import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tensornet_compress.errors import TensorNetError
from tensornet_compress.metric import KroneckerMetric, StoredMetric, euclidean, input_second_moment, loaded_in_turn
from tests.generators import SEEDS, correlated_moment, random_tensor


def factor(size, kind, seed):
    return {"none": None, "diagonal": random_tensor((size,), seed).exp(), "full": correlated_moment(size, seed)}[kind]


def as_matrix(value, size):
    if value is None:
        return torch.eye(size, dtype=torch.float64)
    return value.diag() if value.ndim == 1 else value


KINDS = st.sampled_from(["none", "diagonal", "full"])
METRICS = st.tuples(st.integers(1, 6), st.integers(1, 6), KINDS, KINDS, SEEDS)


@given(METRICS)
def test_norms_are_the_trace_with_both_factors(case):
    m, n, row_kind, column_kind, seed = case
    rows, columns = factor(m, row_kind, seed), factor(n, column_kind, seed + 1)
    metric, error = KroneckerMetric(rows, columns), random_tensor((m, n), seed)
    R, C = as_matrix(rows, m), as_matrix(columns, n)
    assert metric.norm2(error) == pytest.approx(float(torch.trace(R @ error @ C @ error.T)), rel=1e-9)
    assert torch.allclose(metric.apply(error), R @ error @ C)


@given(METRICS)
def test_apply_is_half_the_gradient(case):
    m, n, row_kind, column_kind, seed = case
    metric = KroneckerMetric(factor(m, row_kind, seed), factor(n, column_kind, seed + 1))
    error, direction = random_tensor((m, n), seed), random_tensor((m, n), seed + 2)
    step = 1e-4
    slope = (metric.norm2(error + step * direction) - metric.norm2(error - step * direction)) / (2 * step)
    assert 2 * float((metric.apply(error) * direction).sum()) == pytest.approx(slope, rel=1e-5, abs=1e-7)


@given(METRICS)
def test_whitening_turns_the_row_metric_into_the_identity(case):
    m, n, row_kind, column_kind, seed = case
    rows, columns = factor(m, row_kind, seed), factor(n, column_kind, seed + 1)
    metric, matrix = KroneckerMetric(rows, columns), random_tensor((m, n), seed)
    white = metric.left_whiten(matrix)
    assert KroneckerMetric(columns=columns).norm2(white) == pytest.approx(metric.norm2(matrix), rel=1e-6)
    assert torch.allclose(metric.left_unwhiten(white), matrix, atol=1e-5)
    other = random_tensor((m, 3), seed + 5)
    assert torch.allclose(metric.left_whiten_adjoint(other).T @ matrix, other.T @ white)
    gram = metric.gram(matrix)
    assert float(gram.trace()) == pytest.approx(metric.norm2(matrix), rel=1e-6)
    assert torch.allclose(gram, gram.T, atol=1e-8 * float(gram.abs().max()))


def test_euclidean_is_frobenius_and_has_no_importance():
    error = random_tensor((3, 4))
    assert euclidean().norm2(error) == pytest.approx(float(error.square().sum()))
    assert euclidean().importance() is None


def test_importance_is_the_diagonal_of_the_column_factor():
    moment = correlated_moment(5)
    assert torch.equal(KroneckerMetric(columns=moment).importance(), moment.diagonal())
    assert torch.equal(KroneckerMetric(columns=moment.diagonal()).importance(), moment.diagonal())


@given(SEEDS)
def test_the_input_metric_is_the_mean_squared_change_of_the_output(seed):
    inputs, error = random_tensor((50, 6), seed), random_tensor((4, 6), seed + 1)
    metric = input_second_moment(inputs.T @ inputs / 50, ridge=0.0)
    assert metric.norm2(error) == pytest.approx(float((inputs @ error.T).square().sum(1).mean()), rel=1e-9)


def test_the_ridge_prices_directions_that_were_never_seen():
    moment = torch.zeros(3, 3, dtype=torch.float64)
    moment[0, 0] = 3.0
    metric = input_second_moment(moment, ridge=1e-2)
    assert metric.norm2(torch.tensor([[0.0, 1.0, 0.0]])) == pytest.approx(1e-2)
    assert metric.norm2(torch.tensor([[1.0, 0.0, 0.0]])) == pytest.approx(3.01)


def test_bad_factors_are_refused_with_what_was_given():
    with pytest.raises(TensorNetError, match=r"row factor.*\(2, 3\)"):
        KroneckerMetric(rows=torch.ones(2, 3))
    with pytest.raises(TensorNetError, match=r"column factor.*NaN"):
        KroneckerMetric(columns=torch.tensor([1.0, float("nan")]))
    with pytest.raises(TensorNetError, match=r"\(4, 4\) has trace 0\.0"):
        input_second_moment(torch.zeros(4, 4))


@pytest.mark.parametrize("rows", [None, torch.rand(5, dtype=torch.float64) + 1, correlated_moment(5)])
@pytest.mark.parametrize("columns", [None, torch.rand(7) + 1, correlated_moment(7)])
@pytest.mark.parametrize("rate", [None, 0.25])
def test_a_metric_read_from_its_file_is_the_one_that_was_written(rows, columns, rate, tmp_path):
    metric = KroneckerMetric(rows, columns, rate)
    loaded = StoredMetric.write_all([("layer", metric)], tmp_path)["layer"].load()
    error = random_tensor((5, 7))
    assert loaded.rate == rate
    assert loaded.norm2(error) == pytest.approx(metric.norm2(error), rel=1e-12)
    for a, b in ((metric.rows, loaded.rows), (metric.columns, loaded.columns)):
        assert (a is None and b is None) or (torch.equal(a, b) and a.dtype == b.dtype)


def test_metrics_read_in_turn_share_the_column_factor_that_they_share_in_a_file(tmp_path):
    first, second = correlated_moment(7, 1), correlated_moment(7, 2)
    metrics = {
        "a": KroneckerMetric(torch.rand(5), first, 0.5),
        "b": KroneckerMetric(None, first, 0.25),
        "c": KroneckerMetric(None, second),
        "d": KroneckerMetric(torch.rand(5)),
        "e": KroneckerMetric(None, second),
    }
    stored = StoredMetric.write_all(metrics.items(), tmp_path)
    kept = metrics["a"]
    a, b, none, c, d, e, own = loaded_in_turn([stored["a"], stored["b"], None, stored["c"], stored["d"], stored["e"], kept])
    assert a.columns is b.columns
    assert own is kept
    assert none.rows is None
    assert none.columns is None
    for name, found in zip("abcde", (a, b, c, d, e)):
        for wanted, read in ((metrics[name].rows, found.rows), (metrics[name].columns, found.columns)):
            assert (wanted is None and read is None) or torch.equal(wanted, read)
        assert found.rate == metrics[name].rate
