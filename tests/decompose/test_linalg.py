import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given
from hypothesis import strategies as st

import tensornet_compress as tnc
from tensornet_compress.decompose import linalg, singular_values, svd
from tensornet_compress.decompose.linalg import fix_signs, principal_axes, require_finite, truncated
from tensornet_compress.errors import TensorNetError
from tests.generators import SEEDS, random_tensor

SHAPES = st.tuples(st.integers(1, 12), st.integers(1, 12)) | st.sampled_from([(90, 4), (4, 90)])


def low_rank(shape, rank, seed=0, dtype=torch.float64):
    return random_tensor((shape[0], rank), seed, dtype) @ random_tensor((rank, shape[1]), seed + 1, dtype)


def check_svd(matrix, U, S, Vh, tolerance):
    k = min(matrix.shape)
    assert (U.shape, S.shape, Vh.shape) == ((matrix.shape[0], k), (k,), (k, matrix.shape[1]))
    scale = max(float(matrix.norm()), 1e-12)
    wanted = torch.from_numpy(np.linalg.svd(matrix.double().numpy(), compute_uv=False))
    assert torch.allclose(S.double(), wanted, atol=tolerance * scale)
    assert float(((U * S) @ Vh - matrix).norm()) <= tolerance * scale
    assert torch.allclose(U.T @ U, torch.eye(k, dtype=U.dtype), atol=10 * tolerance)
    assert torch.isfinite(Vh).all()


@given(SHAPES, SEEDS)
def test_the_thin_svd_of_any_shape(shape, seed):
    matrix = random_tensor(shape, seed)
    check_svd(matrix, *svd(matrix), tolerance=1e-11)


@given(SHAPES, SEEDS, st.integers(0, 2))
def test_rank_deficient_matrices(shape, seed, rank):
    matrix = low_rank(shape, rank, seed) if rank else torch.zeros(shape, dtype=torch.float64)
    check_svd(matrix, *svd(matrix), tolerance=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("shape", "rank"), [((200, 90), 5), ((90, 200), 3), ((128, 128), 1)])
def test_truncation_of_a_matrix_of_low_rank_needs_no_whole_svd(shape, rank, dtype, monkeypatch):
    matrix = low_rank(shape, rank, dtype=dtype)
    decomposed = []
    monkeypatch.setattr(linalg, "_solve", lambda core, solve=linalg._solve: decomposed.append(min(core.shape)) or solve(core))
    U, S, Vh = truncated(matrix, rank)
    assert max(decomposed, default=0) <= (rank + 8 if rank > 1 else 0)
    assert float(((U * S) @ Vh - matrix).norm()) <= 10 * torch.finfo(dtype).eps * float(matrix.norm())
    wanted = np.linalg.svd(matrix.double().numpy(), compute_uv=False)[:rank]
    assert np.allclose(S, wanted, rtol=20 * torch.finfo(dtype).eps)
    assert torch.allclose(U.T @ U, torch.eye(rank, dtype=dtype), atol=20 * torch.finfo(dtype).eps)
    assert all(torch.equal(a, b) for a, b in zip(truncated(matrix, rank), (U, S, Vh))), "the same bytes each time"


@given(st.integers(1, 5), st.floats(1e-5, 1.0), SEEDS)
def test_truncation_of_other_matrices_is_that_of_the_whole_svd(rank, noise, seed):
    shape = (72, 80)
    matrix = low_rank(shape, rank, seed) + noise * random_tensor(shape, seed + 2)
    U, S, Vh = truncated(matrix, rank)
    wanted = np.linalg.svd(matrix.numpy(), compute_uv=False)
    assert np.allclose(S, wanted[:rank], rtol=1e-10)
    left = float(((U * S) @ Vh - matrix).norm())
    assert left == pytest.approx(float((wanted[rank:] ** 2).sum() ** 0.5), rel=1e-8)


@pytest.mark.parametrize("rank", [1, 10])
@pytest.mark.parametrize("scale", [1e18, 1e-25, 1e-30, 0.0])
def test_truncation_at_any_scale(scale, rank):
    matrix = random_tensor((200, 150), 3, torch.float32) * scale
    U, S, Vh = truncated(matrix, rank)
    left = (matrix.double() - (U.double() * S.double()) @ Vh.double()).norm()
    wanted = torch.linalg.svdvals(matrix.double())[rank:].square().sum().sqrt()
    assert float(left) == pytest.approx(float(wanted), rel=1e-5)


@pytest.mark.parametrize("scale", [1e15, 1e-18])
def test_outer_products_at_any_scale(scale):
    column, row = random_tensor((90,), 0, torch.float32), random_tensor((70,), 1, torch.float32)
    matrix = torch.outer(column, row) * scale
    U, S, Vh = truncated(matrix, 1)
    assert float(((U * S) @ Vh - matrix).norm()) <= 1e-6 * float(matrix.norm())
    assert float(S) == pytest.approx(float(column.norm() * row.norm()) * scale, rel=1e-6)


@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("bad", ["nan", "inf"])
def test_truncation_refuses_what_is_not_finite(bad, rank):
    matrix = torch.ones(100, 100)
    matrix[3, 4] = float(bad)
    with pytest.raises(TensorNetError, match="1 NaN or infinite"):
        truncated(matrix, rank)


class NoConvergence:
    """Solvers that fail, and a record of the calls."""

    def __init__(self, monkeypatch):
        self.monkeypatch = monkeypatch
        self.calls = []

    def fail(self, module, name, error):
        def refuse(*_args, **_kwargs):
            self.calls.append(name)
            raise error("did not converge")

        self.monkeypatch.setattr(module, name, refuse)


@pytest.fixture
def failing(monkeypatch):
    return NoConvergence(monkeypatch)


@pytest.mark.parametrize("shape", [(8, 5), (5, 8), (40, 3), (6, 6)])
@pytest.mark.parametrize("rank", [2, 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_qr_iteration_steps_in(failing, shape, rank, dtype):
    failing.fail(torch.linalg, "svd", torch.linalg.LinAlgError)
    matrix = low_rank(shape, rank, dtype=dtype)
    check_svd(matrix, *svd(matrix), tolerance=1e-10 if dtype == torch.float64 else 1e-5)
    assert failing.calls == ["svd"]


@pytest.mark.parametrize("shape", [(8, 5), (5, 8), (40, 3), (6, 6)])
@pytest.mark.parametrize("rank", [0, 2, 3, 5])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_gram_matrix_steps_in_last(failing, shape, rank, dtype):
    failing.fail(torch.linalg, "svd", torch.linalg.LinAlgError)
    failing.fail(scipy.linalg, "svd", np.linalg.LinAlgError)
    matrix = low_rank(shape, rank, dtype=dtype) if rank else torch.zeros(shape, dtype=dtype)
    U, S, Vh = svd(matrix)
    scale = max(float(matrix.norm()), 1e-12)
    assert torch.isfinite(U).all()
    assert torch.isfinite(Vh).all()
    assert float(((U * S) @ Vh - matrix).norm()) <= 1e-5 * scale
    assert torch.allclose(U.T @ U, torch.eye(min(shape), dtype=dtype), atol=1e-4)
    assert torch.allclose(Vh @ Vh.T, torch.eye(min(shape), dtype=dtype), atol=1e-4)
    assert len(failing.calls) == 2


def test_when_nothing_converges_the_error_names_shape_and_solvers(failing):
    failing.fail(torch.linalg, "svd", torch.linalg.LinAlgError)
    failing.fail(torch.linalg, "eigh", torch.linalg.LinAlgError)
    failing.fail(scipy.linalg, "svd", np.linalg.LinAlgError)
    with pytest.raises(TensorNetError, match=r"\(4, 3\).*did not converge.*did not converge.*did not converge"):
        svd(torch.eye(4)[:, :3])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_upcast(dtype):
    matrix = random_tensor((6, 4)).to(dtype)
    U, S, Vh = svd(matrix)
    assert U.dtype == S.dtype == Vh.dtype == torch.float32
    check_svd(matrix.float(), U, S, Vh, tolerance=1e-5)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("solver", [svd, singular_values])
def test_bad_numbers_are_counted_in_the_message(value, solver):
    matrix = torch.ones(3, 4)
    matrix[0, :2] = value
    with pytest.raises(TensorNetError, match=r"\(3, 4\) holds 2 NaN or infinite"):
        solver(matrix)


def test_finite_numbers_whose_sum_overflows_are_no_fault():
    require_finite(torch.full((4, 4), 3e38), "matrix")


def test_infinities_that_cancel_are_counted():
    with pytest.raises(TensorNetError, match="holds 2 NaN or infinite"):
        require_finite(torch.tensor([float("inf"), -float("inf"), 1.0]), "vector")


def test_empty_matrices_are_named():
    with pytest.raises(TensorNetError, match=r"\(0, 4\) is empty"):
        svd(torch.zeros(0, 4))


@given(SHAPES, SEEDS)
def test_singular_values_without_vectors(shape, seed):
    matrix = random_tensor(shape, seed)
    wanted = np.linalg.svd(matrix.numpy(), compute_uv=False)
    assert np.allclose(singular_values(matrix).numpy(), wanted, atol=1e-7 * wanted[0])


@given(SHAPES, SEEDS, SEEDS)
def test_signs_are_a_function_of_the_product(shape, seed, flips):
    U, S, Vh = svd(random_tensor(shape, seed))
    signs = random_tensor((len(S),), flips).sign()
    first, second = fix_signs(U, Vh), fix_signs(U * signs, Vh * signs[:, None])
    assert torch.allclose(first[0], second[0])
    assert torch.allclose(first[1], second[1])
    assert torch.allclose((first[0] * S) @ first[1], (U * S) @ Vh)


def test_principal_axes_fall_and_diagonalise() -> None:
    factor = random_tensor((6, 6), 3, torch.float64)
    rows = principal_axes(factor @ factor.T)
    found = rows @ (factor @ factor.T) @ rows.T
    torch.testing.assert_close(found, torch.diag(torch.linalg.eigvalsh(factor @ factor.T).flip(0)))


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (np.ones((3, 3)), "is a ndarray; give a dense torch tensor"),
        ([[1.0, 2.0]], "is a list"),
        (torch.eye(3).to_sparse(), "torch.sparse_coo"),
        (torch.ones(3, 3, device="meta"), "on the meta"),
        (torch.eye(3).to(torch.float8_e4m3fn), "float8_e4m3fn; convert it"),
        (torch.eye(3, dtype=torch.int32), "torch.int32; give real floating point"),
        (torch.full((4, 4), 3e38, dtype=torch.bfloat16), "beyond what cores can hold"),
    ],
)
def test_what_cannot_be_decomposed_is_refused_in_one_sentence(tensor, message):
    with pytest.raises(TensorNetError, match=message):
        tnc.to_network(tensor, ranks=2)


@pytest.mark.parametrize(("value", "dtype"), [(1e16, torch.float32), (1e16, torch.bfloat16), (1e32, torch.float64)])
def test_large_numbers_are_decomposed_without_overflow(value, dtype):
    tensor = value * 0.9 * random_tensor((8, 9)).clamp(-1, 1).to(dtype)
    dense = tnc.to_network(tensor, max_error=1e-3).to_dense()
    assert float((dense - tensor).double().norm() / tensor.double().norm()) < 0.01
