"""Entropy-coded integers with one step in the metric as the number format of a core."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from tensornet_compress.coding.coded_matrix import STEPS_PER_OCTAVE, CodedMatrix, step_sizes
from tensornet_compress.frozen import Frozen

_INT8 = 127
RESIDENT_PARTS = ("_int8", "_row", "_column", "_place", "_excess")
"""Names of what ``CodedFormat.resident`` gives."""


class CodedFormat(Frozen):
    """Entropy-coded integers (``CodedMatrix``) of ``stored`` bytes, made at ``step``.

    How many bytes a core takes follows from its numbers and not from its shape, so a format tells those of the core that it is
    the format of; 0 before it is coded. A core is seen as a matrix (first axis | all others).

    In memory a core is *resident* as int8 codes, a factor a row, a factor a column, and the excess of codes beyond int8.
    """

    kind: Literal["coded"] = "coded"
    step: float = Field(gt=0)
    stored: int = Field(default=0, ge=0)

    @property
    def name(self) -> str:
        """Short name."""
        return "ec"

    def parts(self, shape: tuple[int, ...]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of the stored part."""
        return {"_coded": ((self.stored,), torch.uint8)}

    def encode(self, core: Tensor) -> dict[str, Tensor]:
        """Round to nearest with ``step`` everywhere; the number of bytes is known only afterwards (``of``)."""
        rows, columns = _matrix_shape(tuple(core.shape))
        step = np.full(columns, round(STEPS_PER_OCTAVE * np.log2(self.step)), np.int32)
        size = step_sizes(step[:1])[0]
        codes = np.rint(core.detach().double().reshape(rows, columns).cpu().numpy() / size).astype(np.int32)
        still = np.zeros(rows, np.int32)
        scale = np.full(columns, round(4 * np.log2(max(float(np.abs(codes).mean()), 2.0**-6))), np.int32)
        return self.assemble(CodedMatrix(codes, still, step, still, scale))

    def assemble(self, coded: CodedMatrix) -> dict[str, Tensor]:
        """A coded matrix -> the stored part."""
        return {"_coded": torch.from_numpy(coded.to_bytes())}

    def of(self, parts: Mapping[str, Tensor]) -> CodedFormat:
        """The format of these stored parts."""
        return self.model_copy(update={"stored": parts["_coded"].numel()})

    def coded(self, parts: Mapping[str, Tensor], shape: tuple[int, ...]) -> CodedMatrix:
        """The coded matrix of stored parts.

        Raises:
            CheckpointError: the bytes are damaged.
        """
        return CodedMatrix.from_bytes(parts["_coded"].cpu().numpy(), *_matrix_shape(shape))

    def decode(self, parts: Mapping[str, Tensor], shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Stored or resident parts -> core of ``shape`` in ``dtype``."""
        return decode_codes(*self.operands(parts, shape)).to(dtype).view(shape)

    def decode_rows(self, parts: Mapping[str, Tensor], shape: tuple[int, ...], rows: Tensor, dtype: torch.dtype) -> Tensor:
        """Slices ``rows`` (int64, (k,)) of the first axis, decoded: shape (k, *shape[1:])."""
        codes, row, column, place, excess = self.operands(parts, shape)
        if len(place):
            # The excess lies sorted by row: of every wanted row the stretch that belongs to it.
            border = torch.searchsorted(place // len(column), torch.stack([rows, rows + 1]))
            count = border[1] - border[0]
            owner = torch.repeat_interleave(torch.arange(len(rows), device=rows.device), count)
            which = border[0][owner] + torch.arange(len(owner), device=rows.device) - (count.cumsum(0) - count)[owner]
            place, excess = owner * len(column) + place[which] % len(column), excess[which]
        wanted = decode_codes(codes.index_select(0, rows), row.index_select(0, rows), column, place, excess)
        return wanted.to(dtype).view(len(rows), *shape[1:])

    def operands(self, parts: Mapping[str, Tensor], shape: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """What ``decode_codes`` and products take, of stored or resident parts."""
        if "_int8" not in parts:
            parts = self.resident(parts, shape)
        steps = parts["_row"].view(torch.float32), parts["_column"].view(torch.float32)
        return parts["_int8"], *steps, parts["_place"], parts["_excess"]

    def resident(self, parts: Mapping[str, Tensor], shape: tuple[int, ...]) -> dict[str, Tensor]:
        """Stored parts -> what a module keeps in memory.

        ``_int8`` (rows, columns); ``_row`` (rows,) and ``_column`` (columns,), the steps; ``_place`` int64 (k,) of the codes
        beyond int8, sorted by row, and their ``_excess`` int32 (k,). Steps are fp32 numbers kept as the int32 of their bits, so
        that a model cast to half precision keeps them; ``.view(torch.float32)`` gives them back.
        """
        coded = self.coded(parts, shape)
        near = coded.codes.clip(-_INT8, _INT8)
        place = np.flatnonzero(coded.codes != near)
        device = parts["_coded"].device
        resident = {
            "_int8": near.astype(np.int8),
            "_row": step_sizes(coded.row_step).astype(np.float32).view(np.int32),
            "_column": step_sizes(coded.column_step).astype(np.float32).view(np.int32),
            "_place": place.astype(np.int64),
            "_excess": (coded.codes - near).ravel()[place].astype(np.int32),
        }
        return {name: torch.from_numpy(part).to(device) for name, part in resident.items()}


def decode_codes(codes: Tensor, row: Tensor, column: Tensor, place: Tensor, excess: Tensor) -> Tensor:
    """``row[r] * column[i] * (codes[r, i] + excess)``, fp32 (m, n).

    Args:
        codes: int8 (m, n).
        row, column: fp32 (m,) and (n,).
        place, excess: int64 and int32 (k,): flat places of codes beyond int8, and what is to be added to them.
    """
    dense = codes.float() * column
    if len(place):
        dense.view(-1).index_add_(0, place, excess.float() * column[place % len(column)])
    return dense * row[:, None]


def _matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    return (shape[0], prod(shape[1:])) if shape else (1, 1)
