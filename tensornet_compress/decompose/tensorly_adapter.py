"""The one place that calls tensorly: its SVDs with our own solver, which need no backend, and a backend for others' code.

``tensorly.backend_context`` changes the backend of the whole process when it ends, so it is set and put back by hand.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import tensorly
from tensorly.tenalg.svd import svd_interface
from torch import Tensor

from tensornet_compress.decompose.linalg import fix_signs, truncated


@contextmanager
def tensorly_backend(name: str = "pytorch") -> Iterator[None]:
    """tensorly on a backend in this thread only, the choice before restored afterwards."""
    before = tensorly.get_backend()
    tensorly.set_backend(name, local_threadsafe=True)
    try:
        yield
    finally:
        tensorly.set_backend(before, local_threadsafe=True)


@contextmanager
def tensorly_left_alone() -> Iterator[None]:
    """For importing packages that choose a backend for the whole process (tensorly-torch does): the choice before is restored.
    Not for code that runs beside other threads."""
    before = tensorly.get_backend()
    try:
        yield
    finally:
        tensorly.set_backend(before)


def _own_svd(matrix: Tensor, n_eigenvecs: int | None = None, **_: Any) -> tuple[Tensor, Tensor, Tensor]:
    U, S, Vh = truncated(matrix, n_eigenvecs)
    U, Vh = fix_signs(U, Vh)
    return U, S, Vh


def truncated_svd(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """U (m, r), S (r,), Vh (r, n) through ``tensorly.tenalg.svd_interface`` with our SVD and our signs."""
    triplets: tuple[Tensor, Tensor, Tensor] = svd_interface(matrix, method=_own_svd, n_eigenvecs=rank, flip_sign=False)
    return triplets


def train_cores(tensor: Tensor, ranks: Sequence[int]) -> list[Tensor]:
    """TT-SVD (Oseledets 2011) with tensorly's SVD: cores (r_k, n_k, r_k+1), boundary ranks 1, all but the last orthonormal.

    ``ranks`` are the inner ranks; one that its unfolding cannot support is lowered. The cores of
    ``tensorly.decomposition.tensor_train`` with our SVD, to the bit, without its further passes over both sides of every bond.
    """
    cores, rest = [], tensor.reshape(1, -1)
    for size, rank in zip(tensor.shape[:-1], ranks):
        before = len(rest)
        matrix = rest.reshape(before * size, -1)
        U, S, Vh = truncated_svd(matrix, min(rank, *matrix.shape))
        cores.append(U.reshape(before, size, -1))
        rest = S[:, None] * Vh
    return [*cores, rest.reshape(-1, tensor.shape[-1], 1)]
