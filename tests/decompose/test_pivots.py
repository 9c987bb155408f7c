"""Matrices kept as some of their rows and combinations of these, against dense algebra."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tensornet_compress.coding import parse_format
from tensornet_compress.decompose import realise, stable_pivots
from tensornet_compress.errors import TensorNetError
from tensornet_compress.metric import KroneckerMetric
from tensornet_compress.tensor import Layout, NetworkSpec, TermSpec, Topology
from tests.generators import SEEDS, correlated_moment, random_tensor


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
