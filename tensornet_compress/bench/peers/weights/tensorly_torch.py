"""Layers of tensorly-torch made from the trained weight: its TT-matrix (BlockTT) and CP layers, factors in bf16."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from tensornet_compress.bench.peers.weights.tensorly import digits
from tensornet_compress.bench.side import SIDE, Unavailable
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

CP_ITERATIONS = 10
CP_LARGEST = {"quick": 64, "full": 128}
CAPPED = "CP ranks are capped (largest_rank): alternating least squares of more takes hours, so fewer bytes are used than asked"


def factorise(kind: str, case: WeightCase, target: Target, matrix: Tensor, nbytes: int) -> Approximation:
    """``tltorch.TensorizedTensor`` of a kind, filled from one weight; the largest rank that fits.

    Raises:
        Unavailable: an axis does not factorise in digits: these layers cannot pad; or even rank 1 does not fit.
    """
    tltorch: Any = SIDE.module("tensorly-torch")
    cap = CP_LARGEST["quick" if case.quick else "full"] if kind == "CP" else None
    shapes = tuple(digits(size, 2 if kind == "CP" else 3) for size in matrix.shape)
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
        more: dict[str, Any] = (
            {"n_iter_max": CP_ITERATIONS, "init": "random", "random_state": case.seed} if kind == "CP" else {}
        )
        made.init_from_matrix(matrix, **more)
        for parameter in made.parameters():
            parameter.data = parameter.data.bfloat16().float()
        dense = made.to_matrix().detach().reshape(matrix.shape)
    stored = [parameter.detach().bfloat16() for parameter in made.parameters()]
    rank = made.rank
    ranks = tuple(int(r) for r in rank[1:-1]) if isinstance(rank, (tuple, list)) else (int(rank),)
    found = Approximation(dense, {"factors": stored}, f"tensorly-torch {kind}", "bf16", ranks)
    if kind == "CP":
        case.memo[key] = found
    return found


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


WEIGHT_METHODS.add(
    WeightMethod("tltorch-ttm", by_layer(partial(factorise, "BlockTT")), explanation="tensorly-torch's TT-matrix layer, bf16")
)
WEIGHT_METHODS.add(
    WeightMethod(
        "tltorch-cp",
        by_layer(partial(factorise, "CP"), CAPPED, cp_iterations=CP_ITERATIONS, largest_rank=dict(CP_LARGEST)),
        explanation="tensorly-torch's CP layer, bf16",
    )
)
