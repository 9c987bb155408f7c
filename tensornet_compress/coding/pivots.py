"""A core with the identity among its rows, which are then not stored (PIFA, 2501.19090).

A matrix (m, n) of rank r is a combination of r of its own rows, the pivots: ``W = B W[pivots]``, where B (m, r) holds the
identity at the pivots. Two cores in this form store ``r (m + n) - r^2`` numbers, always fewer than the ``m n`` of the matrix.

=============  ==========================================================
part           content
=============  ==========================================================
``""``         coefficients of the other rows, (m - r, r), in order
``"_pivots"``  one bit per row, set for the r pivots, uint8
=============  ==========================================================

The i-th pivot from above is row i of the identity.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from tensornet_compress.coding.bits import pack_bits, packed_nbytes, unpack_bits
from tensornet_compress.coding.floats import FLOAT_DTYPES, FloatFormat
from tensornet_compress.errors import TensorNetError
from tensornet_compress.frozen import Frozen


class PivotFormat(Frozen):
    """Floating point coefficients of the rows that are no pivots, and which rows these are; for a core (rows, rank)."""

    kind: Literal["pivot"] = "pivot"
    dtype: Literal["fp32", "bf16", "fp16"] = "bf16"

    @property
    def name(self) -> str:
        """Short name, e.g. ``bf16p``."""
        return f"{self.dtype}p"

    @property
    def base(self) -> FloatFormat:
        """The format of the coefficients, and of the other core."""
        return FloatFormat(dtype=self.dtype)

    def parts(self, shape: tuple[int, ...]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shapes and dtypes of the stored parts of a core of ``shape``.

        Raises:
            TensorNetError: the shape is not (rows, rank) with more rows than the rank.
        """
        rows, rank = _sizes(shape)
        return {"": ((rows - rank, rank), FLOAT_DTYPES[self.dtype]), "_pivots": ((packed_nbytes(rows, 1),), torch.uint8)}

    def encode(self, core: Tensor) -> dict[str, Tensor]:
        """Store a core whose pivots hold the identity exactly.

        Raises:
            TensorNetError: the rows of the identity are not all there, in order (see ``decompose.stable_pivots``).
        """
        _sizes(tuple(core.shape))
        return self.assemble(core, _identity_rows(core))

    def assemble(self, core: Tensor, pivots: Tensor) -> dict[str, Tensor]:
        """The stored parts of a core (rows, rank) whose rows ``pivots`` (rank,), ascending, are taken for the identity."""
        chosen = torch.zeros(len(core), dtype=torch.bool, device=core.device)
        chosen[pivots] = True
        return self.base.encode(core[~chosen]) | {"_pivots": pack_bits(chosen.to(torch.uint8), 1)}

    def decode(self, parts: Mapping[str, Tensor], shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Stored parts -> core of ``shape`` in ``dtype``."""
        return self._stacked(parts, shape, dtype).index_select(0, self.positions(parts, shape))

    def decode_rows(self, parts: Mapping[str, Tensor], shape: tuple[int, ...], rows: Tensor, dtype: torch.dtype) -> Tensor:
        """Rows ``rows`` (int64, (k,)) of the core, decoded: shape (k, rank)."""
        return self._stacked(parts, shape, dtype).index_select(0, self.positions(parts, shape).index_select(0, rows))

    def positions(self, parts: Mapping[str, Tensor], shape: tuple[int, ...]) -> Tensor:
        """Where each row lies when the pivots come first and the others after them: int64 (rows,)."""
        rows, rank = _sizes(shape)
        chosen = unpack_bits(parts["_pivots"], 1, rows)
        before = chosen.cumsum(0)
        return torch.where(chosen.bool(), before - 1, rank + torch.arange(rows, device=chosen.device) - before)

    def check(self, parts: Mapping[str, Tensor], shape: tuple[int, ...]) -> None:
        """Refuse parts that come from elsewhere and do not mark exactly ``rank`` pivots.

        Raises:
            TensorNetError: another number of rows is marked, or bits beyond the last row.
        """
        rows, rank = _sizes(shape)
        packed = parts["_pivots"]
        if packed.is_meta:
            return
        marked = int(unpack_bits(packed, 1, 8 * packed.numel()).sum())
        inside = int(unpack_bits(packed, 1, rows).sum())
        if inside != rank or marked != inside:
            raise TensorNetError(
                f"a core of {rows} rows and rank {rank} marks {inside} pivots and {marked - inside} stray bits"
            )

    def _stacked(self, parts: Mapping[str, Tensor], shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        coefficients = parts[""].to(dtype)
        return torch.cat([torch.eye(shape[1], dtype=dtype, device=coefficients.device), coefficients])


def _sizes(shape: tuple[int, ...]) -> tuple[int, int]:
    if len(shape) != 2 or shape[1] >= shape[0]:
        raise TensorNetError(f"pivots are rows of a core (rows, rank) with more rows than the rank, was given shape {shape}")
    return shape[0], shape[1]


def _identity_rows(core: Tensor) -> Tensor:
    """The first rows that hold the identity from top to bottom."""
    single = ((core != 0).sum(1) == 1) & (core == 1).any(1)
    columns = core.abs().argmax(1)
    pivots: list[int] = []
    for row in single.nonzero()[:, 0].tolist():
        if len(pivots) < core.shape[1] and int(columns[row]) == len(pivots):
            pivots.append(row)
    if len(pivots) < core.shape[1]:
        raise TensorNetError(
            f"a core of shape {tuple(core.shape)} does not hold the identity among its rows, only {len(pivots)} rows of it in "
            "order; decompose the matrix with this format instead"
        )
    return torch.tensor(pivots, dtype=torch.int64, device=core.device)
