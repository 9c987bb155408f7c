"""Peers that round each weight on integer grids: to nearest, and as the packages hqq and optimum-quanto do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tensornet_compress.bench.peer_packages import SIDE, Unavailable, fullest
from tensornet_compress.bench.registry import Method
from tensornet_compress.bench.weight_case import SLACK, WEIGHT_METHODS, Approximation, WeightCase, by_layer, parts_of
from tensornet_compress.coding import parse_format
from tensornet_compress.nn import Target

GROUPS = (128, 64, 32, 16)
# Bits of a code -> bits that its packing takes: hqq packs ten codes of 3 bits in 32.
CODES = {bits: float(bits) for bits in range(2, 9)}
HQQ_CODES = {8: 8.0, 4: 4.0, 3: 3.2, 2: 2.0, 1: 1.0}
QUANTO_CODES = {4: 4.0, 2: 2.0}
GRID_BITS = 32
"""Of the scale and the zero point of a group."""


def grid_for(bits: float, codes: Mapping[int, float], groups: tuple[int, ...] = GROUPS) -> tuple[int, int]:
    """(bits of a code, group) of the fullest grid within ``bits`` per weight and the slack that steps need, see ``fullest``:
    most bits first, then the smallest groups. ``codes``: bits of a code -> bits that its packing takes."""
    grids = [(code, group) for code in sorted(codes, reverse=True) for group in sorted(groups)]
    return fullest(grids, lambda code, group: codes[code] + GRID_BITS / group, SLACK * bits, "weight", bits)


def format_for(bits: float, columns: int) -> str:
    """The grid for a number of bits, as a format name: scales and offsets in fp16 of groups, or scales and integer zero points
    of whole rows of ``columns`` weights (the shortest rows of a model), where an offset would shift all small weights alike."""
    code, group = grid_for(bits, CODES, (*GROUPS, max(columns, max(GROUPS))))
    return f"int{code}g{group}o" if group in GROUPS else f"int{code}g0z"


def round_weight(case: WeightCase, target: Target, matrix: Tensor, nbytes: int) -> Approximation:
    """Minimum to maximum of each group."""
    name = format_for(8 * nbytes / matrix.numel(), matrix.shape[1])
    fmt = parse_format(name)
    parts = fmt.encode(matrix)
    stored = parts_of(codes=[parts["_q"]], scales=[parts["_scale"]], zero_points=[parts["_zero"]])
    return Approximation(fmt.decode(parts, tuple(matrix.shape), matrix.dtype), stored, "integers", name)


def hqq(case: WeightCase, target: Target, matrix: Tensor, nbytes: int) -> Approximation:
    """HQQ (Badri and Shaji 2023): half-quadratic fit of scale and zero point, no calibration."""
    quantizer: Any = SIDE.module("hqq").Quantizer
    groups = tuple(group for group in GROUPS if matrix.numel() % group == 0)
    if not groups:
        raise Unavailable(f"HQQ needs weights that divide into groups of 16; {target.name} has {matrix.numel():,}")
    code, group = grid_for(8 * nbytes / matrix.numel(), HQQ_CODES, groups)
    packed, meta = quantizer.quantize(
        matrix, nbits=code, channel_wise=True, group_size=group, optimize=True, round_zero=code == 4, axis=1,
        device="cpu", compute_dtype=torch.float32,
    )  # fmt: skip
    meta["scale"], meta["zero"] = meta["scale"].half(), meta["zero"].half()
    stored = parts_of(codes=[packed], scales=[meta["scale"]], zero_points=[meta["zero"]])
    meta = meta | {"scale": meta["scale"].float(), "zero": meta["zero"].float()}
    decoded = quantizer.dequantize(packed, meta).float().reshape(matrix.shape)
    return Approximation(decoded, stored, "integers", f"hqq int{code} g{group}")


def quanto(case: WeightCase, target: Target, matrix: Tensor, nbytes: int) -> Approximation:
    """``optimum.quanto.quantize_weight``: qint8 by rows, qint4 and qint2 in groups, scale and shift in fp16."""
    package: Any = SIDE.module("quanto")
    columns, half = matrix.shape[1], matrix.half()
    if 8 + 16 / columns <= SLACK * 8 * nbytes / matrix.numel():
        scale = package.AbsmaxOptimizer()(half, qtype=package.qint8, axis=0)
        coded = package.quantize_weight(half, qtype=package.qint8, axis=0, scale=scale, activation_qtype=None)
        stored = parts_of(codes=[coded._data], scales=[coded._scale])
        return Approximation(coded.dequantize().float(), stored, "integers", "quanto qint8")
    groups = tuple(group for group in GROUPS if columns % group == 0) or (columns,)
    code, group = grid_for(8 * nbytes / matrix.numel(), QUANTO_CODES, groups)
    qtype = {4: package.qint4, 2: package.qint2}[code]
    scale, shift = package.MaxOptimizer()(half, qtype=qtype, axis=0, group_size=group)
    coded = package.quantize_weight(half, qtype=qtype, axis=0, scale=scale, shift=shift, group_size=group)
    codes: Any = coded._data
    stored = parts_of(codes=[getattr(codes, "_data", codes)], scales=[coded._scale], zero_points=[coded._shift])
    decoded = coded.dequantize().to(torch.float32).reshape(matrix.shape)
    return Approximation(decoded, stored, "integers", f"quanto qint{code} g{group}")


WEIGHT_METHODS.add(Method("rtn", by_layer(round_weight), "round to nearest in groups, scale and offset in fp16"))
WEIGHT_METHODS.add(Method("hqq", by_layer(hqq), "the package hqq, groups along the inputs, fp16 scales"))
WEIGHT_METHODS.add(Method("quanto", by_layer(quanto), "the package optimum-quanto, min-max grids"))
