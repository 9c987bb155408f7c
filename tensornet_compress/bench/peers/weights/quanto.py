"""optimum-quanto by its own package: qint8 by rows, qint4 and qint2 in groups, scale and shift in fp16."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tensornet_compress.bench.peers.weights.grids import grid_for
from tensornet_compress.bench.side import SIDE
from tensornet_compress.bench.weight_case import SLACK, WEIGHT_METHODS, Approximation, WeightCase, WeightMethod, by_layer
from tensornet_compress.nn import Target

CODES = {4: 4.0, 2: 2.0}


def quantise(case: WeightCase, target: Target, matrix: Tensor, nbytes: int) -> Approximation:
    """``optimum.quanto.quantize_weight`` on one weight."""
    quanto: Any = SIDE.module("quanto")
    rows, columns = matrix.shape
    half = matrix.half()
    if 8 + 16 / columns <= SLACK * 8 * nbytes / matrix.numel():
        scale = quanto.AbsmaxOptimizer()(half, qtype=quanto.qint8, axis=0)
        found = quanto.quantize_weight(half, qtype=quanto.qint8, axis=0, scale=scale, activation_qtype=None)
        stored = {"codes": [found._data], "scales": [found._scale]}
        return Approximation(found.dequantize().float(), stored, "integers", "quanto qint8")
    groups = tuple(group for group in (128, 64, 32, 16) if columns % group == 0) or (columns,)
    code, group = grid_for(8 * nbytes / matrix.numel(), CODES, 32, groups)
    qtype = {4: quanto.qint4, 2: quanto.qint2}[code]
    scale, shift = quanto.MaxOptimizer()(half, qtype=qtype, axis=0, group_size=group)
    found = quanto.quantize_weight(half, qtype=qtype, axis=0, scale=scale, shift=shift, group_size=group)
    codes: Any = found._data
    stored = {"codes": [getattr(codes, "_data", codes)], "scales": [found._scale], "zero points": [found._shift]}
    decoded = found.dequantize().to(torch.float32).reshape(rows, columns)
    return Approximation(decoded, stored, "integers", f"quanto qint{code} g{group}")


WEIGHT_METHODS.add(WeightMethod("quanto", by_layer(quantise), explanation="the package optimum-quanto, min-max grids"))
