"""Singular value decompositions that do not fail: clear errors on bad input, and a chain of solvers."""

from __future__ import annotations

from math import inf, isfinite

import numpy as np
import scipy.linalg
import torch
from torch import Tensor

from tensornet_compress.errors import TensorNetError

_TALL = 8
_THIN = 4
_SPARE = 8
_PROBES = 4
_LOST = 8


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that factorisations of a tensor run in: float64 stays, everything else is upcast to float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def require_finite(tensor: Tensor, what: str) -> None:
    """Raise TensorNetError when ``tensor`` is not a dense tensor of real floating point numbers, is empty or holds a NaN or an
    infinity."""
    if not isinstance(tensor, Tensor) or tensor.layout is not torch.strided or tensor.is_meta:
        kind = f"on the {tensor.device}, {tensor.layout}" if isinstance(tensor, Tensor) else f"a {type(tensor).__name__}"
        raise TensorNetError(f"{what} is {kind}; give a dense torch tensor, as torch.as_tensor or to_dense make it")
    if tensor.is_floating_point() and tensor.dtype.itemsize < 2:
        raise TensorNetError(f"{what} of shape {tuple(tensor.shape)} holds {tensor.dtype}; convert it to bfloat16 or float32")
    if not tensor.is_floating_point():
        raise TensorNetError(f"{what} of shape {tuple(tensor.shape)} holds {tensor.dtype}; give real floating point numbers")
    if tensor.numel() == 0:
        raise TensorNetError(f"{what} of shape {tuple(tensor.shape)} is empty; there is nothing to decompose")
    # A sum of finite numbers can overflow, but one with a NaN or an infinity is never finite: one cheap pass nearly always.
    if not isfinite(float(tensor.detach().sum())) and not torch.isfinite(tensor).all():
        bad = int((~torch.isfinite(tensor)).sum())
        raise TensorNetError(f"{what} of shape {tuple(tensor.shape)} holds {bad} NaN or infinite entries; clean it first")


def svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Thin SVD of an (m, n) matrix: U (m, k), S (k,) descending, Vh (k, n), k = min(m, n).

    Half precision is upcast. LAPACK's divide-and-conquer runs first; where it does not converge, the QR iteration (gesvd),
    then the eigenvectors of the Gram matrix in float64. Very tall or wide matrices are reduced by QR first.

    Raises:
        TensorNetError: empty or non-finite input, or no solver converged.
    """
    require_finite(matrix, "matrix")
    matrix = matrix.to(working_dtype(matrix.dtype))
    rows, columns = matrix.shape
    if rows < columns:
        U, S, Vh = svd(matrix.T)
        return Vh.T, S, U.T
    if rows > _TALL * columns:
        Q, R = torch.linalg.qr(matrix)
        U, S, Vh = _solve(R)
        return Q @ U, S, Vh
    return _solve(matrix)


def truncated(matrix: Tensor, rank: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """The leading ``rank`` (None: all) singular triplets, as ``svd``.

    Where a random projection (Halko, Martinsson & Tropp 0909.4061, seeded) shows that a matrix has hardly more than ``rank``
    values, these come from it; it misses no more of the norm than 8 times the machine's precision, as LAPACK may. All other
    matrices are decomposed whole.
    """
    short = min(matrix.shape)
    if rank is not None and 0 < rank < short:
        work = matrix.to(working_dtype(matrix.dtype))
        # Neither is tried on what is not finite: the SVD below refuses that.
        norm = _norm(work)
        found = _outer_product(work, norm) if rank == 1 and 0 < norm < inf else None
        if found is None and (rank + _SPARE + _PROBES) * _THIN <= short and 0 < norm < inf:
            found = _projected(work, rank, norm)
        if found is not None:
            return found
    U, S, Vh = svd(matrix)
    return U[:, :rank], S[:rank], Vh[:rank]


def _outer_product(matrix: Tensor, norm: float) -> tuple[Tensor, Tensor, Tensor] | None:
    """The triplet of a matrix of rank 1, from the row and the column of a large entry; None where that leaves anything."""
    column, row = rank_one_parts(matrix)
    if not _norm(torch.outer(column, row).sub_(matrix)) <= _lost(matrix) * norm:
        return None
    length, width = (float(torch.linalg.vector_norm(part, dtype=torch.float64)) for part in (column, row))
    return (column / length)[:, None], matrix.new_tensor([length * width]), (row / width)[None]


def rank_one_parts(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """``column, row`` with ``column row'`` the matrix, when that is of rank 1 and not zero."""
    row = matrix[int(torch.linalg.vector_norm(matrix, dim=1).argmax())]
    place = int(row.abs().argmax())
    # Of an outer product one column is exact but for rounding, which sums over long rows in single precision are not.
    return matrix[:, place] / row[place], row


def _projected(matrix: Tensor, rank: int, norm: float) -> tuple[Tensor, Tensor, Tensor] | None:
    """Triplets from a basis of ``rank + 8`` random combinations of columns; None where that is not the whole range."""
    count = rank + _SPARE
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(matrix.shape[1], count + _PROBES, generator=generator, dtype=matrix.dtype).to(matrix.device)
    sample = matrix @ drawn
    basis = torch.linalg.qr(sample[:, :count])[0]
    probes = sample[:, count:]
    # Most matrices are told by a few combinations that the basis was not made of.
    if not _norm(probes - basis @ (basis.T @ probes)) <= 3 * _lost(matrix) * _norm(probes):
        return None
    core = basis.T @ matrix
    if not _norm(matrix - basis @ core) <= _lost(matrix) * norm:
        return None
    Q, R = torch.linalg.qr(core.T)
    V, S, Uh = _solve(R)
    U, Vh = Uh.T, (Q @ V).T
    return (basis @ U)[:, :rank], S[:rank], Vh[:rank]


def _norm(tensor: Tensor) -> float:
    """A norm to be compared: in the tensor's own precision, a third of the time, unless squares might leave that."""
    found = float(torch.linalg.vector_norm(tensor))
    return found if 1e-12 < found < 1e12 else float(torch.linalg.vector_norm(tensor, dtype=torch.float64))


def _lost(matrix: Tensor) -> float:
    """What LAPACK may lose of a matrix of norm 1."""
    return _LOST * torch.finfo(matrix.dtype).eps


def _solve(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    failures = []
    for solver in (_divide_and_conquer, _qr_iteration, _gram_float64):
        try:
            U, S, Vh = solver(matrix)
        except (torch.linalg.LinAlgError, np.linalg.LinAlgError) as error:
            failures.append(f"{solver.__name__}: {error}")
            continue
        if torch.isfinite(S).all():
            return U, S, Vh
        failures.append(f"{solver.__name__}: non-finite singular values")
    raise TensorNetError(f"no SVD solver converged on a {tuple(matrix.shape)} matrix: {'; '.join(failures)}")


def _divide_and_conquer(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.linalg.svd(matrix, full_matrices=False)


def _qr_iteration(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    parts = scipy.linalg.svd(matrix.cpu().numpy(), full_matrices=False, lapack_driver="gesvd")
    U, S, Vh = (torch.from_numpy(np.ascontiguousarray(part)).to(matrix) for part in parts)
    return U, S, Vh


def _gram_float64(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    wide = matrix.double()
    _, V = torch.linalg.eigh(wide.T @ wide)
    V = V.flip(1)
    # The columns of ``wide @ V`` are U S up to rounding; QR keeps U orthonormal where S vanishes, with signs of its own.
    U, R = torch.linalg.qr(wide @ V)
    S = R.diagonal().abs()
    U = U * torch.where(R.diagonal() < 0, -1.0, 1.0).to(U)
    return U.to(matrix), S.to(matrix), V.T.to(matrix)


def principal_axes(covariance: Tensor) -> Tensor:
    """Eigenvectors of a symmetric (n, n) matrix as rows, by falling eigenvalue; in float64 where float32 does not converge."""
    try:
        vectors = torch.linalg.eigh(covariance)[1]
    except torch.linalg.LinAlgError:
        vectors = torch.linalg.eigh(covariance.double())[1].to(covariance.dtype)
    return vectors.flip(1).T.contiguous()


def singular_values(matrix: Tensor) -> Tensor:
    """All singular values, descending, float64, from the float64 Gram matrix of the smaller side.

    Values below about 1e-8 of the largest are rounding noise.
    """
    require_finite(matrix, "unfolding")
    return gram_squares(matrix.double()).sqrt()


def gram_squares(matrix: Tensor) -> Tensor:
    """All squared singular values, descending, float64, from the Gram matrix of the smaller side in the matrix's precision."""
    short = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    return torch.linalg.eigvalsh(short @ short.T).double().flip(0).clamp_min(0)


def fix_signs(U: Tensor, Vh: Tensor) -> tuple[Tensor, Tensor]:
    """Make the largest entry of each column of U positive, so that equal input gives equal bytes."""
    if U.shape[1] == 1:
        return (-U, -Vh) if float(U[int(U.abs().argmax())]) < 0 else (U, Vh)
    largest = U.gather(0, U.abs().argmax(0, keepdim=True))
    signs = torch.where(largest < 0, -1.0, 1.0).to(U)
    return U * signs, Vh * signs.T
