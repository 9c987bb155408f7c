"""Tensor formats by tensorly as it comes: a tensor train and a TT-matrix over three digits of each axis, cores in bf16.

Every bond gets the same rank, the largest that fits (capped where the unfolding has fewer rows), in native order.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tensornet_compress.bench.weight_case import (
    WEIGHT_METHODS,
    Approximation,
    WeightCase,
    WeightMethod,
    by_layer,
    require_rank_one,
)
from tensornet_compress.decompose.tensorly_adapter import tensorly_backend
from tensornet_compress.nn import Target
from tensornet_compress.tensor import choose_radices

DIGITS = 3
Decompose = Callable[[Any, tuple[int, ...]], Any]


def digits(size: int, count: int = DIGITS) -> tuple[int, ...]:
    """An axis as a product of ``count`` sizes; padded where it has no such factors."""
    return choose_radices(size, count, 0.1)


def chain_ranks(dims: tuple[int, ...], rank: int) -> tuple[int, ...]:
    """Ranks of a train of modes ``dims``, ends included, none beyond what its unfolding has."""
    total, left, ranks = 1, 1, [1]
    for size in dims:
        total *= size
    for size in dims[:-1]:
        left *= size
        ranks.append(min(rank, left, total // left))
    return (*ranks, 1)


def numbers(dims: tuple[int, ...], ranks: tuple[int, ...]) -> int:
    """Numbers of a train."""
    return sum(ranks[i] * size * ranks[i + 1] for i, size in enumerate(dims))


def decompose(matrix_form: bool, case: WeightCase, target: Target, matrix: Tensor, nbytes: int) -> Approximation:
    """``tensorly.decomposition`` on one weight."""
    from tensorly.decomposition import tensor_train, tensor_train_matrix

    rows, columns = (digits(size) for size in matrix.shape)
    dims = tuple(a * b for a, b in zip(rows, columns)) if matrix_form else (*rows, *columns)
    rank = 1
    while numbers(dims, chain_ranks(dims, rank + 1)) * 2 <= nbytes and chain_ranks(dims, rank + 1) != chain_ranks(dims, rank):
        rank += 1
    ranks = chain_ranks(dims, rank)
    require_rank_one(2 * numbers(dims, ranks), nbytes, matrix.numel())
    padded = torch.zeros(torch.Size(rows).numel(), torch.Size(columns).numel())
    padded[: matrix.shape[0], : matrix.shape[1]] = matrix
    tensor = padded.reshape(*rows, *columns).numpy()
    with tensorly_backend("numpy"):
        cores = (tensor_train_matrix if matrix_form else tensor_train)(tensor, rank=list(ranks))
        stored = [torch.from_numpy(core.copy()).bfloat16() for core in cores]
    dense = _matrix(stored, matrix_form)[: matrix.shape[0], : matrix.shape[1]]
    name = "TT-matrix" if matrix_form else "tensor train"
    return Approximation(dense, {"factors": stored}, name, "bf16", ranks[1:-1])


def _matrix(cores: list[Tensor], matrix_form: bool) -> Tensor:
    """Cores (left, ..., right) -> the dense matrix."""
    dense = cores[0].float()
    for core in cores[1:]:
        dense = torch.tensordot(dense, core.float(), dims=1)
    dense = dense.squeeze(0).squeeze(-1)
    modes = dense.shape
    if matrix_form:
        dense = dense.permute(*range(0, dense.ndim, 2), *range(1, dense.ndim, 2))
        modes = dense.shape
    return dense.reshape(modes[:DIGITS].numel(), modes[DIGITS:].numel())


WEIGHT_METHODS.add(
    WeightMethod("tensorly-tt", by_layer(partial(decompose, False)), explanation="tensorly's tensor train, cores in bf16")
)
WEIGHT_METHODS.add(
    WeightMethod("tensorly-ttm", by_layer(partial(decompose, True)), explanation="tensorly's TT-matrix, cores in bf16")
)
