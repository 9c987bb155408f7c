"""Entropy-coded integers with one step in the metric as the number format of a core."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from tensornet_compress.coding.coded_matrix import ROOTS, STEPS_PER_OCTAVE, CodedMatrix, step_sizes
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
        if "_int8" not in parts:
            parts = self.resident(parts, shape)
        rows = torch.arange(parts["_int8"].shape[0], device=parts["_int8"].device)
        return self._rows_of(parts, None, rows).to(dtype).view(shape)

    def decode_rows(self, parts: Mapping[str, Tensor], shape: tuple[int, ...], rows: Tensor, dtype: torch.dtype) -> Tensor:
        """Slices ``rows`` (int64, (k,)) of the first axis, decoded: shape (k, *shape[1:])."""
        if "_int8" not in parts:
            parts = self.resident(parts, shape)
        return self._rows_of(parts, rows, rows).to(dtype).view(len(rows), *shape[1:])

    def resident(self, parts: Mapping[str, Tensor], shape: tuple[int, ...]) -> dict[str, Tensor]:
        """Stored parts -> what a module keeps in memory.

        ``_int8`` (rows, columns); ``_row`` (rows,) and ``_column`` (columns,), int16 exponents of the steps; ``_place`` int64
        (k,) of the codes beyond int8, sorted by row, and their ``_excess`` int32 (k,).
        """
        coded = self.coded(parts, shape)
        near = coded.codes.clip(-_INT8, _INT8)
        place = np.flatnonzero(coded.codes != near)
        device = parts["_coded"].device
        resident = {
            "_int8": near.astype(np.int8),
            "_row": coded.row_step.astype(np.int16),
            "_column": coded.column_step.astype(np.int16),
            "_place": place.astype(np.int64),
            "_excess": (coded.codes - near).ravel()[place].astype(np.int32),
        }
        return {name: torch.from_numpy(part).to(device) for name, part in resident.items()}

    @staticmethod
    def _rows_of(parts: Mapping[str, Tensor], picked: Tensor | None, rows: Tensor) -> Tensor:
        codes, row, column = parts["_int8"], parts["_row"], _steps(parts["_column"])
        if picked is not None:
            codes, row = codes.index_select(0, picked), row.index_select(0, picked)
        dense = codes.float() * column
        if len(parts["_place"]):
            columns = parts["_int8"].shape[1]
            excess = parts["_excess"].float() * column[parts["_place"] % columns]
            if picked is None:
                dense.view(-1).index_add_(0, parts["_place"], excess)
            else:
                # The excess lies sorted by row: of every picked row the stretch that belongs to it.
                border = torch.searchsorted(parts["_place"] // columns, torch.stack([rows, rows + 1]))
                count = border[1] - border[0]
                owner = torch.repeat_interleave(torch.arange(len(rows), device=rows.device), count)
                inside = torch.arange(len(owner), device=rows.device) - (count.cumsum(0) - count)[owner]
                which = border[0][owner] + inside
                dense.view(-1).index_add_(0, owner * columns + parts["_place"][which] % columns, excess[which])
        return dense * _steps(row)[:, None]


def _steps(exponents: Tensor) -> Tensor:
    """Steps ``2^(exponents / 8)``, fp32: the very numbers of ``step_sizes``."""
    wide = exponents.int()
    roots = torch.tensor(ROOTS.astype(np.float32), device=exponents.device)
    return torch.ldexp(roots[(wide & 7).long()], wide >> 3)


def _matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    return (shape[0], prod(shape[1:])) if shape else (1, 1)
