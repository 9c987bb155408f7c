"""Tensor formats by other packages, made from the trained weight, factors in bf16.

``tensorly`` as it comes: a tensor train and a TT-matrix over three digits of each axis, in native order. Every bond gets the
same rank, the largest that fits (capped where the unfolding has fewer rows). ``tensorly-torch``: the tensors of its TT-matrix
(BlockTT) and CP layers.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from tensornet_compress.bench.peer_packages import SIDE, Unavailable
from tensornet_compress.bench.registry import Method
from tensornet_compress.bench.weight_case import WEIGHT_METHODS, Approximation, WeightCase, by_layer, parts_of, require_rank_one
from tensornet_compress.decompose.tensorly_adapter import tensorly_backend
from tensornet_compress.nn import Target
from tensornet_compress.tensor import choose_radices

DIGITS = 3
CP_ITERATIONS = 10
CP_LARGEST = {"quick": 64, "full": 128}
CAPPED = "CP ranks are capped (largest_rank): alternating least squares of more takes hours, so fewer bytes are used than asked"


def digits(size: int, count: int = DIGITS) -> tuple[int, ...]:
    """An axis as a product of ``count`` sizes; padded where it has no such factors."""
    return choose_radices(size, count, 0.1)


def chain_ranks(dims: tuple[int, ...], rank: int) -> tuple[int, ...]:
    """Ranks of a train of modes ``dims``, ends included, none beyond what its unfolding has."""
    total, left, ranks = torch.Size(dims).numel(), 1, [1]
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
    return Approximation(dense, parts_of(factors=stored), name, "bf16", ranks[1:-1])


def _matrix(cores: list[Tensor], matrix_form: bool) -> Tensor:
    """Cores (left, ..., right) -> the dense matrix."""
    dense = cores[0].float()
    for core in cores[1:]:
        dense = torch.tensordot(dense, core.float(), dims=1)
    dense = dense.squeeze(0).squeeze(-1)
    if matrix_form:
        dense = dense.permute(*range(0, dense.ndim, 2), *range(1, dense.ndim, 2))
    return dense.reshape(dense.shape[:DIGITS].numel(), dense.shape[DIGITS:].numel())


def factorise(kind: str, case: WeightCase, target: Target, matrix: Tensor, nbytes: int) -> Approximation:
    """``tltorch.TensorizedTensor`` of a kind, filled from one weight; the largest rank that fits. Raises ``Unavailable``
    where an axis does not factorise in digits (these layers cannot pad), or even rank 1 does not fit."""
    tltorch: Any = SIDE.module("tensorly-torch")
    cap = CP_LARGEST["quick" if case.quick else "full"] if kind == "CP" else None
    shapes = tuple(digits(size, 2 if kind == "CP" else DIGITS) for size in matrix.shape)
    for size, shape in zip(matrix.shape, shapes):
        if torch.Size(shape).numel() != size:
            raise Unavailable(f"{target.name}: {size} has no such digits, and tensorly-torch cannot pad")
    with tensorly_backend():
        made = _largest(tltorch, kind, shapes, nbytes, cap)
        require_rank_one(2 * sum(parameter.numel() for parameter in made.parameters()), nbytes, matrix.numel())
        # At the cap all sizes are one fit.
        key = (kind, target.name, str(made.rank))
        if key in case.memo:
            known: Approximation = case.memo[key]
            return known
        more = {"n_iter_max": CP_ITERATIONS, "init": "random", "random_state": case.seed} if kind == "CP" else {}
        made.init_from_matrix(matrix, **more)
        for parameter in made.parameters():
            parameter.data = parameter.data.bfloat16().float()
        dense = made.to_matrix().detach().reshape(matrix.shape)
    stored = [parameter.detach().bfloat16() for parameter in made.parameters()]
    rank = made.rank
    ranks = tuple(int(r) for r in rank[1:-1]) if isinstance(rank, (tuple, list)) else (int(rank),)
    approximation = Approximation(dense, parts_of(factors=stored), f"tensorly-torch {kind}", "bf16", ranks)
    if kind == "CP":
        case.memo[key] = approximation
    return approximation


def _largest(tltorch: Any, kind: str, shapes: tuple[tuple[int, ...], ...], nbytes: int, cap: int | None) -> Any:
    """The factorised tensor of the largest rank (at most ``cap``) whose parameters take ``nbytes`` in bf16."""

    def make(rank: int) -> Any:
        return tltorch.TensorizedTensor.new(shapes, rank=rank, factorization=kind)

    def cost(rank: int) -> int:
        return 2 * sum(parameter.numel() for parameter in make(rank).parameters())

    if cap is not None and cost(cap) <= nbytes:
        return make(cap)
    low, high = 1, 2
    while cost(high) <= nbytes and cost(high) > cost(low):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if cost(middle) <= nbytes else (low, middle)
    return make(low)


_CP = by_layer(partial(factorise, "CP"), CAPPED, cp_iterations=CP_ITERATIONS, largest_rank=dict(CP_LARGEST))
for _name, _compress, _explanation in (
    ("tensorly-tt", by_layer(partial(decompose, False)), "tensorly's tensor train, cores in bf16"),
    ("tensorly-ttm", by_layer(partial(decompose, True)), "tensorly's TT-matrix, cores in bf16"),
    ("tltorch-ttm", by_layer(partial(factorise, "BlockTT")), "tensorly-torch's TT-matrix layer, bf16"),
    ("tltorch-cp", _CP, "tensorly-torch's CP layer, bf16"),
):
    WEIGHT_METHODS.add(Method(_name, _compress, _explanation))
