"""Two cores in a metric against the whitened SVD of scipy."""

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tensornet_compress as tnc
from tensornet_compress.coding import parse_format
from tensornet_compress.decompose import matrix_spectrum, realise, stable_pivots
from tensornet_compress.decompose.matrix import squared_singular_values
from tensornet_compress.errors import TensorNetError
from tensornet_compress.metric import KroneckerMetric, euclidean, input_second_moment
from tensornet_compress.tensor import Layout, NetworkSpec, TermSpec, Topology
from tests.generators import FP32, SEEDS, correlated_moment, random_tensor

SHAPES = st.tuples(st.integers(2, 14), st.integers(2, 14)) | st.sampled_from([(40, 5), (5, 40)])


def whitened_optimum(matrix, rows, columns, rank):
    """Best rank-r approximation by scipy: Cholesky factors of both sides, truncated SVD between them."""
    left = np.linalg.cholesky(rows.numpy()).T
    right = np.linalg.cholesky(columns.numpy())
    U, S, Vh = scipy.linalg.svd(left @ matrix.numpy() @ right, full_matrices=False)
    best = np.linalg.solve(left, U[:, :rank] * S[:rank]) @ np.linalg.solve(right.T, Vh[:rank].T).T
    return torch.from_numpy(best), float((S[rank:] ** 2).sum())


@given(SHAPES, SEEDS, st.data())
def test_the_input_metric_reaches_the_whitened_svd(shape, seed, data):
    rank = data.draw(st.integers(1, min(shape)))
    matrix = random_tensor(shape, seed)
    moment = correlated_moment(shape[1], seed)
    metric = KroneckerMetric(columns=moment)
    best, optimum = whitened_optimum(matrix, torch.eye(shape[0], dtype=torch.float64), moment, rank)
    left, right = matrix_spectrum(matrix, metric).cores(rank)
    scale = metric.norm2(matrix)
    assert metric.norm2(matrix - left @ right) == pytest.approx(optimum, rel=1e-6, abs=1e-9 * scale)
    assert matrix_spectrum(matrix, metric).error(rank) == pytest.approx(optimum, rel=1e-6, abs=1e-9 * scale)
    assert metric.norm2(best - left @ right) <= 1e-6 * scale


@given(st.tuples(st.integers(2, 10), st.integers(2, 10)) | st.just((24, 4)), SEEDS, st.data())
def test_both_sides_of_a_kronecker_metric(shape, seed, data):
    rank = data.draw(st.integers(1, min(shape)))
    matrix = random_tensor(shape, seed)
    rows, columns = correlated_moment(shape[0], seed), correlated_moment(shape[1], seed + 1)
    metric = KroneckerMetric(rows, columns)
    left, right = matrix_spectrum(matrix, metric).cores(rank)
    _, optimum = whitened_optimum(matrix, rows, columns, rank)
    assert metric.norm2(matrix - left @ right) == pytest.approx(optimum, rel=1e-5, abs=1e-8 * metric.norm2(matrix))


@given(SHAPES, SEEDS, st.data())
def test_shrunk_values_are_those_of_the_whitened_matrix(shape, seed, data):
    factors = torch.tensor(data.draw(st.lists(st.sampled_from([0.0, 0.3, 1.0]), min_size=min(shape), max_size=min(shape))))
    matrix = random_tensor(shape, seed)
    metric = KroneckerMetric(correlated_moment(shape[0], seed), correlated_moment(shape[1], seed + 1))
    spectrum = matrix_spectrum(matrix, metric)
    expected = (factors.double() * spectrum.squares.sqrt()).sort(descending=True).values
    found = matrix_spectrum(spectrum.shrunk(factors), metric).squares.sqrt()
    assert torch.allclose(found, expected, atol=1e-5 * float(spectrum.squares[0]) ** 0.5)


@given(SHAPES, SEEDS, st.data())
def test_the_euclidean_metric_is_the_plain_svd(shape, seed, data):
    rank = data.draw(st.integers(1, min(shape)))
    matrix = random_tensor(shape, seed)
    left, right = matrix_spectrum(matrix, euclidean()).cores(rank)
    U, S, Vh = np.linalg.svd(matrix.numpy(), full_matrices=False)
    assert np.allclose((left @ right).numpy(), (U[:, :rank] * S[:rank]) @ Vh[:rank], atol=1e-6)
    assert torch.allclose(left.T @ left, torch.eye(rank, dtype=torch.float64), atol=1e-8)


@given(SEEDS, st.integers(1, 6))
def test_activation_aware_truncation_beats_euclidean_truncation_in_the_metric(seed, rank):
    matrix = random_tensor((10, 12), seed)
    metric = input_second_moment(correlated_moment(12, seed))
    errors = []
    for choice in (metric, euclidean()):
        left, right = matrix_spectrum(matrix, choice).cores(rank)
        errors.append(metric.norm2(matrix - left @ right))
    assert errors[0] < errors[1]


@given(SEEDS, st.integers(1, 5))
def test_directions_without_input_are_free(seed, rank):
    """Inputs in a plane of dimension ``rank``: that many ranks lose nothing that the layer could show."""
    matrix = random_tensor((8, 10), seed)
    inputs = random_tensor((40, rank), seed + 1) @ random_tensor((rank, 10), seed + 2)
    metric = KroneckerMetric(columns=inputs.T @ inputs / 40)
    left, right = matrix_spectrum(matrix, metric).cores(rank)
    assert torch.allclose(inputs @ (left @ right).T, inputs @ matrix.T, atol=1e-6)


@pytest.mark.parametrize("factor", ["rows", "columns"])
def test_a_diagonal_equals_its_matrix(factor):
    matrix = random_tensor((6, 6), 1)
    diagonal = random_tensor((6,), 2).exp()
    products = []
    for value in (diagonal, diagonal.diag()):
        left, right = matrix_spectrum(matrix, KroneckerMetric(**{factor: value})).cores(3)
        products.append(left @ right)
    assert torch.allclose(products[0], products[1], atol=1e-9)


def test_realised_two_cores_are_the_optimum_of_the_metric():
    matrix = random_tensor((10, 12), 4)
    moment = correlated_moment(12, 4)
    network = tnc.to_network(matrix, ranks=4, metric=KroneckerMetric(columns=moment), fmt=FP32)
    _, optimum = whitened_optimum(matrix, torch.eye(10, dtype=torch.float64), moment, 4)
    metric = KroneckerMetric(columns=moment)
    assert metric.norm2(matrix - network.to_dense(torch.float64)) == pytest.approx(optimum, rel=1e-4)


@pytest.mark.parametrize("shape", [(30, 8), (12, 10), (8, 30)])
def test_few_ranks_are_those_of_all(shape):
    matrix, metric = random_tensor(shape, 1, torch.float32), KroneckerMetric(columns=correlated_moment(shape[1]))
    whole, few = matrix_spectrum(matrix, metric), matrix_spectrum(matrix, metric, most=3)
    assert torch.equal(whole.squares, few.squares)
    assert few.left.shape == (shape[0], 3)
    products = [left @ right for left, right in (whole.cores(3), few.cores(3))]
    torch.testing.assert_close(*products, rtol=1e-4, atol=1e-5)


def test_a_weight_with_nan_is_refused():
    with pytest.raises(TensorNetError, match=r"\(2, 2\) holds 4 NaN"):
        matrix_spectrum(torch.full((2, 2), float("nan")), euclidean())


@pytest.mark.parametrize("small", [1e-3, 1e-5, 3e-7])
def test_singular_values_far_below_the_first_are_kept(small):
    """Cores are in single precision, each rounded beside its own size."""
    left, right = (torch.linalg.qr(random_tensor((size, 2), size)).Q for size in (30, 40))
    matrix = left @ torch.diag(torch.tensor([1.0, small], dtype=torch.float64)) @ right.T
    network = tnc.to_network(matrix, topology=tnc.Topology.two_cores(2, left=(0,)), max_error=small / 5)
    assert float((network.to_dense() - matrix).norm() / matrix.norm()) <= small / 5
    assert max(core.shape[-1] for core in network.cores(0)[:1]) == 2


def spec_of(shape, rank, *names):
    names = names * 2 if len(names) == 1 else names
    term = TermSpec(
        layout=Layout.native(shape),
        topology=Topology.two_cores(len(shape), (0,)),
        ranks=(rank,),
        formats=tuple(parse_format(name) for name in names),
    )
    return NetworkSpec(shape=shape, terms=(term,))


@settings(max_examples=60)
@given(st.integers(2, 40), st.integers(1, 12), SEEDS, st.sampled_from([1.0, 1.1, 2.0, 10.0]))
def test_rows_are_combined_from_pivots_with_bounded_coefficients(rows, rank, seed, growth):
    rank = min(rank, rows)
    left = random_tensor((rows, rank), seed)
    pivots, combined = stable_pivots(left, growth)
    assert pivots.tolist() == sorted(set(pivots.tolist()))
    assert len(pivots) == rank
    assert torch.equal(combined[pivots], torch.eye(rank, dtype=torch.float64))
    assert float(combined.abs().max()) <= growth * (1 + 1e-6)
    torch.testing.assert_close(combined @ left[pivots], left, rtol=1e-9, atol=1e-9)


def test_qr_pivots_alone_would_grow():
    """Kahan's matrix, for which QR with column pivoting changes nothing and combines with large coefficients."""
    size, c = 24, 0.3
    s = (1 - c * c) ** 0.5
    kahan = torch.eye(size, dtype=torch.float64) - c * torch.ones(size, size, dtype=torch.float64).triu(1)
    kahan = torch.diag(s ** torch.arange(size, dtype=torch.float64)) @ kahan
    # Ties are broken in favour of the first columns.
    kahan = kahan @ torch.diag((1 - 1e-6) ** torch.arange(size, dtype=torch.float64))
    left = kahan[:-1].T.contiguous()
    grown = torch.linalg.solve(left[:-1], left, left=False).abs().max()
    pivots, combined = stable_pivots(left, 1.5)
    assert grown > 10
    assert float(combined.abs().max()) <= 1.5 + 1e-9
    torch.testing.assert_close(combined @ left[pivots], left)


@pytest.mark.parametrize(
    "metric",
    [
        KroneckerMetric(),
        KroneckerMetric(columns=correlated_moment(20, 1)),
        KroneckerMetric(rows=torch.rand(30, dtype=torch.float64) + 0.5),
        KroneckerMetric(rows=correlated_moment(30, 2), columns=correlated_moment(20, 1)),
    ],
    ids=["euclidean", "columns", "rows", "both"],
)
@pytest.mark.parametrize("rank", [1, 7, 19])
def test_pivots_give_the_truncation_of_two_cores(metric, rank):
    matrix = random_tensor((30, 20), 3, torch.float32)
    plain = realise(matrix, spec_of((30, 20), rank, "fp32"), metric).to_dense()
    pivoted = realise(matrix, spec_of((30, 20), rank, "fp32p", "fp32"), metric).to_dense()
    size = metric.norm2(matrix)
    assert metric.norm2((pivoted - plain).double()) < 1e-8 * size
    lost, lost_plain = (metric.norm2((matrix - found).double()) for found in (pivoted, plain))
    assert lost == pytest.approx(lost_plain, rel=1e-4, abs=1e-8 * size)


@pytest.mark.parametrize("shape", [(96, 64), (64, 96), (80, 80)])
@pytest.mark.parametrize("rank", [5, 40, 60])
@pytest.mark.parametrize("calibrated", [False, True])
def test_bf16_loses_about_what_two_bf16_cores_lose(shape, rank, calibrated):
    metric = KroneckerMetric(columns=correlated_moment(shape[1], 1)) if calibrated else KroneckerMetric()
    matrix = random_tensor(shape, 5, torch.float32)
    exact = realise(matrix, spec_of(shape, rank, "fp32"), metric).to_dense()
    errors = {}
    for names in (("bf16", "bf16"), ("bf16p", "bf16")):
        found = realise(matrix, spec_of(shape, rank, *names), metric).to_dense()
        errors[names[0]] = metric.norm2(exact - found) / metric.norm2(exact)
    assert errors["bf16p"] < 4 * errors["bf16"] < 4 * 2.0**-14
    assert errors["bf16p"] < 2.0**-14


def test_a_matrix_of_its_rank_is_kept_within_rounding():
    """A matrix of rank 6 in bf16: every entry within bf16's rounding of the size of its row."""
    matrix = (random_tensor((50, 6), 1) @ random_tensor((6, 40), 2)).float()
    network = realise(matrix, spec_of((50, 40), 6, "bf16p", "bf16"))
    assert network.nbytes == 2 * (6 * 90 - 36) + 7
    error = (network.to_dense() - matrix).abs()
    assert bool((error <= 6 * 2 * 2.0**-8 * matrix.abs().max()).all())
    assert float(error.norm() / matrix.norm()) < 2.0**-7


def test_integer_rows_are_made_up_for():
    """Pivot rows in integers: the coefficients are fitted to what was rounded."""
    metric = KroneckerMetric(columns=correlated_moment(64, 1))
    matrix = random_tensor((90, 64), 3, torch.float32)
    network = realise(matrix, spec_of((90, 64), 20, "bf16p", "int8g64"), metric)
    plain = realise(matrix, spec_of((90, 64), 20, "bf16"), metric)
    assert metric.norm2(matrix - network.to_dense()) < 1.05 * metric.norm2(matrix - plain.to_dense())


def test_kernels_and_zeros():
    kernel = random_tensor((12, 3, 2, 2), 1, torch.float32)
    spec = spec_of((12, 3, 2, 2), 11, "fp32p", "fp32")
    assert (realise(kernel, spec).to_dense() - kernel).norm() < 0.5 * kernel.norm()
    zeros = torch.zeros(12, 8)
    assert torch.equal(realise(zeros, spec_of((12, 8), 3, "bf16p", "bf16")).to_dense(), zeros)


def test_what_has_no_pivots_is_refused():
    with pytest.raises(TensorNetError, match="depend on each other"):
        stable_pivots(torch.ones(5, 2))
    with pytest.raises(TensorNetError, match="growth"):
        stable_pivots(torch.eye(5), growth=0.5)
    layout = Layout.of(((2, 2), (2, 2)), mode_order=(0, 2, 1, 3))
    formats = (parse_format("bf16p"), parse_format("bf16"))
    term = TermSpec(layout=layout, topology=Topology.two_cores(4, (0,)), ranks=(1,), formats=formats)
    with pytest.raises(TensorNetError, match="rows from columns"):
        realise(torch.eye(4), NetworkSpec(shape=(4, 4), terms=(term,)))


@pytest.mark.parametrize("shape", [(12, 20), (40, 20)])
@pytest.mark.parametrize("tokens", [3, 200])
def test_squared_singular_values_are_those_of_the_spectrum(shape, tokens):
    generator = torch.Generator().manual_seed(tokens)
    inputs = torch.randn(tokens, 20, generator=generator, dtype=torch.float64)
    metric = KroneckerMetric(torch.rand(shape[0], generator=generator) + 0.1, inputs.T @ inputs / tokens)
    matrix = torch.randn(*shape, generator=generator)
    wanted = matrix_spectrum(matrix, metric).squares
    found = squared_singular_values(matrix, metric)
    assert torch.allclose(found[: len(wanted)], wanted, rtol=1e-5, atol=1e-6 * float(wanted.max()))
    faint = squared_singular_values(matrix, KroneckerMetric(metric.rows.double() * 1e-40, metric.columns)) * 1e40
    assert torch.allclose(faint[: len(wanted)], wanted, rtol=1e-5, atol=1e-6 * float(wanted.max()))


@pytest.mark.parametrize("shape", [(12, 20), (40, 20)])
def test_small_squared_singular_values_are_not_drowned_by_a_large_one(shape):
    inputs = torch.randn(200, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    inputs[:, 3] *= 1e4
    metric = KroneckerMetric(torch.ones(shape[0]), inputs.T @ inputs / 200)
    matrix = torch.randn(*shape, generator=torch.Generator().manual_seed(1))
    wanted = matrix_spectrum(matrix, metric).squares
    found = squared_singular_values(matrix, metric)
    assert torch.allclose(found[: len(wanted)], wanted, rtol=1e-4, atol=1e-3 * float(wanted.median()))
