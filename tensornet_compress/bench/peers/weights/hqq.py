"""HQQ (Badri and Shaji 2023) by its own package: half-quadratic fit of scale and zero point, no calibration.

Scales and zero points are kept in fp16, codes as the package packs them (3-bit codes take 3.2 bits).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tensornet_compress.bench.peers.weights.grids import grid_for
from tensornet_compress.bench.side import SIDE, Unavailable
from tensornet_compress.bench.weight_case import WEIGHT_METHODS, Approximation, WeightCase, WeightMethod, by_layer
from tensornet_compress.nn import Target

CODES = {8: 8.0, 4: 4.0, 3: 3.2, 2: 2.0, 1: 1.0}


def quantise(case: WeightCase, target: Target, matrix: Tensor, nbytes: int) -> Approximation:
    """``hqq.core.quantize.Quantizer`` on one weight."""
    quantizer: Any = SIDE.module("hqq").Quantizer
    groups = tuple(group for group in (128, 64, 32, 16) if matrix.numel() % group == 0)
    if not groups:
        raise Unavailable(f"HQQ needs weights that divide into groups of 16; {target.name} has {matrix.numel():,}")
    code, group = grid_for(8 * nbytes / matrix.numel(), CODES, 32, groups)
    packed, meta = quantizer.quantize(
        matrix, nbits=code, channel_wise=True, group_size=group, optimize=True, round_zero=code == 4, axis=1,
        device="cpu", compute_dtype=torch.float32,
    )  # fmt: skip
    meta["scale"], meta["zero"] = meta["scale"].half(), meta["zero"].half()
    stored = {"codes": [packed], "scales": [meta["scale"]], "zero points": [meta["zero"]]}
    meta = meta | {"scale": meta["scale"].float(), "zero": meta["zero"].float()}
    decoded = quantizer.dequantize(packed, meta).float().reshape(matrix.shape)
    return Approximation(decoded, stored, "integers", f"hqq int{code} g{group}")


WEIGHT_METHODS.add(WeightMethod("hqq", by_layer(quantise), explanation="the package hqq, groups along the inputs, fp16 scales"))
