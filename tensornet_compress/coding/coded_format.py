"""Entropy-coded integers with one step in the metric as the number format of a core."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from tensornet_compress.coding.bits import pack_bits
from tensornet_compress.coding.coded_matrix import STEPS_PER_OCTAVE, CodedMatrix, step_sizes
from tensornet_compress.coding.codes import Codes
from tensornet_compress.frozen import Frozen

_INT8 = 127
_NIBBLE = 4
_MOST_BEYOND = 0.01
"""Share of codes beyond 4 bits up to which they cost less time and memory than whole bytes for all."""


class CodedFormat(Frozen):
    """Entropy-coded integers (``CodedMatrix``) of ``stored`` bytes, made at ``step``.

    How many bytes a core takes follows from its numbers and not from its shape, so a format tells those of the core that it is
    the format of; 0 before it is coded. ``states``: 8 for integers of a trellis, where a core has enough
    rows. A core is seen as a matrix (first axis | all others).

    In memory a core is *resident* as codes of 4 or 8 bits, a factor a row, a factor a column, and the excess of codes
    beyond these.
    """

    kind: Literal["coded"] = "coded"
    step: float = Field(gt=0)
    stored: int = Field(default=0, ge=0)
    states: Literal[0, 8] = 0

    coded_part: ClassVar[str] = "_coded"
    resident_parts: ClassVar[tuple[str, ...]] = ("_near", "_row", "_column", "_place", "_excess")

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
        """A coded matrix, whose codes are lost by it -> the stored part."""
        return {"_coded": torch.from_numpy(coded.to_bytes(overwrite=True))}

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
        return self.operands(parts, shape).dense(torch.float32).to(dtype).view(shape)

    def decode_rows(self, parts: Mapping[str, Tensor], shape: tuple[int, ...], rows: Tensor, dtype: torch.dtype) -> Tensor:
        """Slices ``rows`` (int64, (k,)) of the first axis, decoded: shape (k, *shape[1:])."""
        return self.operands(parts, shape).rows(rows).dense(torch.float32).to(dtype).view(len(rows), *shape[1:])

    def operands(self, parts: Mapping[str, Tensor], shape: tuple[int, ...]) -> Codes:
        """Stored or resident parts as the matrix that products take."""
        if "_near" not in parts:
            parts = self.resident(parts, shape)
        row, column = (parts[name].view(torch.float32) for name in ("_row", "_column"))
        near, width = parts["_near"], len(column)
        bits = 8 if near.dtype == torch.int8 else _NIBBLE
        return Codes(near, row[:, None], None, column, parts["_place"], parts["_excess"], bits, width, width)

    def resident(self, parts: Mapping[str, Tensor], shape: tuple[int, ...]) -> dict[str, Tensor]:
        """Stored parts -> what a module keeps in memory.

        ``_near``: int8 (rows, columns), or packed in 4 bits (uint8) where nearly all codes are from -8 to 7; ``_row`` (rows,)
        and ``_column`` (columns,), the steps; ``_place`` int32 (k,), or int64 from 2^31 codes on, of the
        codes beyond these, sorted by row, and their ``_excess`` int32 (k,). Steps are fp32 numbers kept as the int32 of their
        bits, so that a model cast to half precision keeps them; ``.view(torch.float32)`` gives them back.
        """
        coded = self.coded(parts, shape)
        # Codes of a large table take much memory: what is made of them is as small as it can be from the start.
        near = _within(coded.codes, -8, 7)
        place = np.flatnonzero(coded.codes != near)
        nibbles = len(place) <= _MOST_BEYOND * coded.codes.size and coded.codes.shape[1] % 2 == 0
        if not nibbles:
            near = _within(coded.codes, -_INT8, _INT8)
            place = np.flatnonzero(coded.codes != near)
        codes = torch.from_numpy(near)
        resident = {
            "_near": pack_bits(codes + 8, _NIBBLE) if nibbles else codes,
            "_row": _bits_of(step_sizes(coded.row_step)),
            "_column": _bits_of(step_sizes(coded.column_step)),
            "_place": torch.from_numpy(place.astype(np.int32 if coded.codes.size < 1 << 31 else np.int64)),
            "_excess": torch.from_numpy(coded.codes.ravel()[place] - near.ravel()[place]),
        }
        return {name: part.to(parts["_coded"].device) for name, part in resident.items()}


def _within(codes: NDArray[np.int32], least: int, most: int) -> NDArray[np.int8]:
    near = np.empty(codes.shape, np.int8)
    np.clip(codes, least, most, out=near, casting="unsafe")
    return near


def _bits_of(steps: NDArray[np.float64]) -> Tensor:
    return torch.from_numpy(steps.astype(np.float32).view(np.int32))


def _matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    return (shape[0], prod(shape[1:])) if shape else (1, 1)
