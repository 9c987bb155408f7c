"""Products with packed fields (``coding/planes.py``) on a GPU: bytes are read as they lie in memory, fields are cut from them
and multiplied in fp32. Sums run over fields or tokens in a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tensornet_compress.coding.planes import UNIT, WIDTHS, PlaneLayout, Planes

_ROWS, _FIELDS = 16, 32
"""Rows of floats and fields of a tile: no product of tiles takes fewer than 16."""
_SPLIT = 8
"""Units whose weighted sum one program makes."""


def times_planes(factors: Tensor, layout: PlaneLayout, planes: Planes) -> Tensor:
    """As ``plane_products.times_planes``."""
    batch, rows, count = factors.shape
    tokens = [UNIT * chunk[4].shape[2] for chunk in planes.chunks]
    factors, out, done = factors.contiguous(), factors.new_empty(batch, rows, sum(tokens)), 0
    # Triton launches on the current device, whatever that of its tensors.
    with torch.cuda.device_of(factors):
        for chunk, length in zip(planes.chunks, tokens):
            units = length // UNIT
            _times[(batch * units, triton.cdiv(rows, _ROWS))](
                factors, *_contiguous(chunk), out, rows, count, units, sum(tokens), done, *layout.rows.values(),
                ROWS=_ROWS, FIELDS=_FIELDS, UNIT=UNIT,
            )  # fmt: skip
            done += length
    return out


def planes_times(layout: PlaneLayout, planes: Planes, weights: Tensor) -> Tensor:
    """As ``plane_products.planes_times``."""
    batch, rows, tokens = weights.shape
    weights, done = weights.contiguous(), 0
    total = weights.new_zeros(batch, rows, layout.count)
    with torch.cuda.device_of(weights):
        for chunk in planes.chunks:
            units, first = chunk[4].shape[2], 0
            splits = triton.cdiv(units, _SPLIT)
            sums = weights.new_empty(splits, batch, rows, layout.count)
            for width, part in zip(WIDTHS, _contiguous(chunk)):
                if count := layout.rows[width]:
                    _sums[(batch * splits, triton.cdiv(count, _FIELDS), triton.cdiv(rows, _ROWS))](
                        weights, part, sums, batch, rows, count, first, layout.count, units, tokens, done,
                        WIDTH=width, ROWS=_ROWS, FIELDS=_FIELDS, UNIT=UNIT, SPLIT=_SPLIT,
                    )  # fmt: skip
                    first += count
            total += sums.sum(0)
            done += UNIT * units
    return total


def _contiguous(chunk: dict[int, Tensor]) -> list[Tensor]:
    return [chunk[width].contiguous() for width in WIDTHS]


@triton.jit
def _fields(plane, first, count, row, units, unit, WIDTH: tl.constexpr, FIELDS: tl.constexpr, UNIT: tl.constexpr):  # type: ignore[no-untyped-def]
    """Fields ``first`` onwards, of ``count``, of all tokens of a unit: (FIELDS, UNIT); zeros beyond."""
    field, token = first + tl.arange(0, FIELDS), tl.arange(0, UNIT)
    size: tl.constexpr = UNIT * WIDTH // 8
    place = ((row * count + field).to(tl.int64) * units + unit) * size
    byte = tl.load(plane + place[:, None] + (token % size)[None, :], mask=(field < count)[:, None], other=0)
    return ((byte.to(tl.int32) >> ((token // size) * WIDTH)[None, :]) & ((1 << WIDTH) - 1)).to(tl.float32)


@triton.jit
def _added(  # type: ignore[no-untyped-def]
    total, factors, number, rows, before, fields, plane, count, row, units, unit,
    WIDTH: tl.constexpr, FIELDS: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """``total`` (rows, UNIT) and the products with all planes of a width."""
    for first in range(0, count, FIELDS):
        field = first + tl.arange(0, FIELDS)
        given = tl.load(
            factors + (row * rows + number)[:, None] * fields + (before + field)[None, :],
            mask=(number < rows)[:, None] & (field < count)[None, :],
            other=0.0,
        )
        total += tl.dot(given, _fields(plane, first, count, row, units, unit, WIDTH, FIELDS, UNIT), input_precision="ieee")
    return total


@triton.jit
def _times(  # type: ignore[no-untyped-def]
    factors, plane4, plane2, plane1, out, rows, fields, units, tokens, done, n4, n2, n1,
    ROWS: tl.constexpr, FIELDS: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    row, unit = tl.program_id(0) // units, tl.program_id(0) % units
    number = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    total = tl.full((ROWS, UNIT), 0.0, tl.float32)
    total = _added(total, factors, number, rows, 0, fields, plane4, n4, row, units, unit, 4, FIELDS, UNIT)
    total = _added(total, factors, number, rows, n4, fields, plane2, n2, row, units, unit, 2, FIELDS, UNIT)
    total = _added(total, factors, number, rows, n4 + n2, fields, plane1, n1, row, units, unit, 1, FIELDS, UNIT)
    token = done + unit * UNIT + tl.arange(0, UNIT)
    place = (row * rows + number).to(tl.int64)[:, None] * tokens + token[None, :]
    tl.store(out + place, total, mask=(number < rows)[:, None])


@triton.jit
def _sums(  # type: ignore[no-untyped-def]
    weights, plane, out, batch, rows, count, before, fields, units, tokens, done,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, FIELDS: tl.constexpr, UNIT: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    row, split = tl.program_id(0) % batch, tl.program_id(0) // batch
    first = tl.program_id(1) * FIELDS
    field, number = first + tl.arange(0, FIELDS), tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    total = tl.full((ROWS, FIELDS), 0.0, tl.float32)
    for unit in range(split * SPLIT, tl.minimum(units, (split + 1) * SPLIT)):
        token = done + unit * UNIT + tl.arange(0, UNIT)
        place = (row * rows + number).to(tl.int64)[:, None] * tokens + token[None, :]
        given = tl.load(weights + place, mask=(number < rows)[:, None], other=0.0)
        found = _fields(plane, first, count, row, units, unit, WIDTH, FIELDS, UNIT)
        total += tl.dot(given, tl.trans(found), input_precision="ieee")
    place = ((split * batch + row) * rows + number)[:, None] * fields + (before + field)[None, :]
    tl.store(out + place, total, mask=(number < rows)[:, None] & (field < count)[None, :])
