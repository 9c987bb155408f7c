"""Packed integers as the number format of a core: codes of 2 to 8 bits in groups that share a scale and a zero point.

A core is seen as a matrix ``(rows, run)`` (see ``grouped_view``), whose rows are cut in groups along their run.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from tensornet_compress.coding.bits import pack_bits, packed_nbytes
from tensornet_compress.coding.codes import Codes
from tensornet_compress.coding.floats import FLOAT_DTYPES, saturated
from tensornet_compress.frozen import Frozen

_CLIPPING = (0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.6, 0.5)


class IntFormat(Frozen):
    """Integers of ``bits`` bits in groups of ``group`` that share a scale and, unless symmetric, a zero point.

    ``zero``: ``none`` (symmetric), ``int`` (a packed integer of ``bits`` bits per group) or ``float`` (an offset per group in
    ``scale_dtype``). ``group=0`` means one group per row.
    """

    kind: Literal["int"] = "int"
    bits: int = Field(default=4, ge=2, le=8)
    group: int = Field(default=64, ge=0)
    zero: Literal["none", "int", "float"] = "none"
    scale_dtype: Literal["fp16", "bf16", "fp32"] = "fp16"

    @property
    def name(self) -> str:
        """Short name, e.g. ``int4g64z``."""
        return f"int{self.bits}g{self.group}" + {"none": "", "int": "z", "float": "o"}[self.zero]

    @property
    def levels(self) -> int:
        """Largest code."""
        return (1 << self.bits) - 1

    def parts(self, shape: tuple[int, ...]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shapes and dtypes of the stored parts of a core of ``shape``."""
        rows, run = grouped_view(shape, self.group)
        groups = -(-run // self.width(run))
        scale_dtype = FLOAT_DTYPES[self.scale_dtype]
        stored: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "_q": ((packed_nbytes(rows * run, self.bits),), torch.uint8),
            "_scale": ((rows, groups), scale_dtype),
        }
        if self.zero == "int":
            stored["_zero"] = ((packed_nbytes(rows * groups, self.bits),), torch.uint8)
        elif self.zero == "float":
            stored["_zero"] = ((rows, groups), scale_dtype)
        return stored

    def width(self, run: int) -> int:
        """Effective group width on rows of ``run`` numbers."""
        return min(self.group or run, run)

    def encode(self, core: Tensor) -> dict[str, Tensor]:
        """Round to nearest on grids that span the range of each group."""
        matrix = core.reshape(grouped_view(tuple(core.shape), self.group))
        scale, zero = self.fit_grid(matrix)
        return self.assemble(self.quantise(matrix, scale, zero), scale, zero)

    def fit_grid(self, matrix: Tensor, importance: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Scales and zero points (as decoded, float) of the groups of a (rows, run) matrix: two (rows, groups) tensors.

        A number decodes as ``scale * code + zero``; for integer zero points ``zero`` is a multiple of ``scale``. A grid spans
        the group's range, or, given the ``importance`` (run,) of squared errors along the run, the part of it (tried in a few
        sizes) that loses least.
        """
        grouped = self._grouped(matrix.float())
        low, high = grouped.amin(-1), grouped.amax(-1)
        if importance is None:
            return self._grid(low, high)
        weights = self._grouped(importance.float().reshape(1, -1))
        best_scale, best_zero = self._grid(low, high)
        best_error = self._grid_error(grouped, weights, best_scale, best_zero)
        for shrink in _CLIPPING if self.bits <= 4 else _CLIPPING[:2]:
            scale, zero = self._grid(low * shrink, high * shrink)
            error = self._grid_error(grouped, weights, scale, zero)
            better = error < best_error
            best_error = torch.where(better, error, best_error)
            best_scale, best_zero = torch.where(better, scale, best_scale), torch.where(better, zero, best_zero)
        return best_scale, best_zero

    def quantise(self, matrix: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """Nearest codes (uint8, same shape as the (rows, run) matrix) on the given grids."""
        wide_scale, wide_zero = self.spread(scale, matrix.shape[1]), self.spread(zero, matrix.shape[1])
        return ((matrix.float() - wide_zero) / wide_scale).round().clamp(0, self.levels).to(torch.uint8)

    def spread(self, per_group: Tensor, run: int) -> Tensor:
        """A (rows, groups) tensor repeated to (rows, run)."""
        return per_group.repeat_interleave(self.width(run), dim=1)[:, :run]

    def assemble(self, codes: Tensor, scale: Tensor, zero: Tensor) -> dict[str, Tensor]:
        """Codes and grids -> the stored parts."""
        scale_dtype = FLOAT_DTYPES[self.scale_dtype]
        parts = {"_q": pack_bits(codes, self.bits), "_scale": scale.to(scale_dtype)}
        if self.zero == "int":
            parts["_zero"] = pack_bits((-zero / scale).round().clamp(0, self.levels), self.bits)
        elif self.zero == "float":
            parts["_zero"] = zero.to(scale_dtype)
        return parts

    def operands(self, parts: Mapping[str, Tensor], shape: tuple[int, ...]) -> Codes:
        """Stored parts as the matrix (rows, run) that products take."""
        _, run = grouped_view(shape, self.group)
        zero = parts.get("_zero")
        return Codes(parts["_q"], parts["_scale"], zero, None, None, None, self.bits, run, self.width(run))

    def decode(self, parts: Mapping[str, Tensor], shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Stored parts -> core of ``shape`` in ``dtype``; scaled in at least float32 and rounded once."""
        return self.operands(parts, shape).dense(dtype).view(shape)

    def decode_rows(self, parts: Mapping[str, Tensor], shape: tuple[int, ...], rows: Tensor, dtype: torch.dtype) -> Tensor:
        """Slices ``rows`` (int64, (k,)) of the first axis, decoded: shape (k, *shape[1:]).

        Only the wanted rows are unpacked, unless groups run across rows.
        """
        if len(shape) != 2 or grouped_view(shape, self.group)[0] != shape[0]:
            return self.decode(parts, shape, dtype).index_select(0, rows)
        return self.operands(parts, shape).rows(rows).dense(dtype)

    def _grouped(self, matrix: Tensor) -> Tensor:
        """(rows, run) -> (rows, groups, width); a ragged last group is filled with copies of its last number."""
        rows, run = matrix.shape
        width = self.width(run)
        missing = -run % width
        if missing:
            matrix = torch.cat([matrix, matrix[:, -1:].expand(rows, missing)], dim=1)
        return matrix.reshape(rows, -1, width)

    def _grid(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Grids that span [low, high], rounded to what will be stored and kept within the range of its dtype."""
        stored = FLOAT_DTYPES[self.scale_dtype]
        smallest = torch.finfo(stored).smallest_normal * torch.finfo(stored).eps
        low, high = saturated(low, stored), saturated(high, stored)
        if self.zero == "none":
            half = 1 << (self.bits - 1)
            scale = (torch.maximum(-low / half, high / (half - 1)).clamp_min(smallest)).to(stored).float()
            return scale, -scale * half
        if self.zero == "int":
            low, high = low.clamp_max(0), high.clamp_min(0)
        scale = ((high - low) / self.levels).clamp_min(smallest).to(stored).float()
        if self.zero == "int":
            return scale, -scale * (-low / scale).round().clamp(0, self.levels)
        return scale, low.to(stored).float()

    def _grid_error(self, grouped: Tensor, weights: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        codes = ((grouped - zero[..., None]) / scale[..., None]).round_().clamp_(0, self.levels)
        return ((codes * scale[..., None] + zero[..., None] - grouped).square_() * weights).sum(-1)


def grouped_view(shape: tuple[int, ...], group: int) -> tuple[int, int]:
    """How an integer format sees a core: (rows, run). The run is the last axis, or the whole core flattened when the last
    axis is shorter than a group."""
    if not shape:
        return 1, 1
    total, last = prod(shape), shape[-1]
    return (total // last, last) if last >= group else (1, total)
