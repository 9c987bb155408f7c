"""Factorisations by the LAPACK that SciPy brings, called so that other threads run meanwhile (SciPy's own functions hold the
interpreter's lock): two to six times as fast as PyTorch's on many processors."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import numpy as np
from numba.extending import get_cython_function_address
from numpy.typing import NDArray

from tensornet_compress.errors import TensorNetError


def inverse_root(matrix: NDArray[np.float64]) -> NDArray[np.float64]:
    """``L^-1`` (n, n) of ``matrix = L L'``, C-contiguous float64, in whose place it is put: in the lower triangle, with rubbish
    above.

    Raises:
        TensorNetError: the matrix is not positive definite, or not finite.
    """
    n = len(matrix)
    # LAPACK reads columns first: to it the array is its transpose, and L' the upper triangle.
    failed = _call("dpotrf", b"U", n, matrix, n)
    if failed or not np.isfinite(matrix.diagonal().sum()):
        raise TensorNetError(f"a matrix {matrix.shape} is not positive definite, or not finite")
    _call("dtrtri", b"U", b"N", n, matrix, n)
    return matrix


def eigenvalues(matrix: NDArray[np.floating[Any]]) -> NDArray[np.floating[Any]]:
    """Eigenvalues (n,), ascending, of a symmetric ``matrix``, C-contiguous float64 or float32, in its precision; it is
    overwritten.

    Raises:
        TensorNetError: they were not found, as of matrices that are not finite.
    """
    n, count, dtype = len(matrix), 0, matrix.dtype
    unused, found = np.zeros(1, dtype), np.full(len(matrix), np.nan, dtype)
    size, whole = np.ones(1, dtype), np.ones(1, np.intc)
    routine = "ssyevr" if dtype == np.float32 else "dsyevr"
    # Asked with sizes of -1, the routine tells how many numbers it needs beside the matrix.
    for _ in range(2):
        sizes = (-1, -1) if not count else (len(size), len(whole))
        failed = _call(routine, b"N", b"A", b"U", n, matrix, max(n, 1), unused, unused, 1, n, unused, 0, found, unused, 1,
                       np.zeros(2 * max(n, 1), np.intc), size, sizes[0], whole, sizes[1])  # fmt: skip
        size, whole, count = np.empty(max(int(size[0]), 1), dtype), np.empty(max(int(whole[0]), 1), np.intc), 1
    if failed or not np.isfinite(found).all():
        raise TensorNetError(f"a matrix {matrix.shape} has no eigenvalues that could be found; are its entries finite?")
    return found


def _call(name: str, *given: Any) -> int:
    """Call a routine; ``info``, its last argument, is given back."""
    info = ctypes.c_int(0)
    held = [ctypes.c_int(value) if isinstance(value, int) else value for value in given]
    _routine(name)(*[_reference(value) for value in held], ctypes.byref(info))
    return info.value


def _reference(value: Any) -> Any:
    if isinstance(value, bytes):
        return ctypes.c_char_p(value)
    return ctypes.byref(value) if isinstance(value, ctypes.c_int) else ctypes.c_void_p(value.ctypes.data)


@cache
def _routine(name: str) -> Any:
    return ctypes.CFUNCTYPE(None)(get_cython_function_address("scipy.linalg.cython_lapack", name))
