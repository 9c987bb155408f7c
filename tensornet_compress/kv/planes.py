"""Fixed-rate codes that attention can contract against: integers cut in bit planes that unpack in a few wide operations.

A code of b bits is a sum of fields of 8, 4, 2 and 1 bits. Because dequantisation is linear, every field is just one more row of
the contraction, scaled by its place value. Fields of one width lie together, ``(batch, rows, units, bytes)``: byte j of a
unit of 64 tokens holds tokens j, j + n, j + 2n ... (n bytes a unit), so that unpacking is shift-and-mask without any shuffle.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from tensornet_compress.errors import TensorNetError

UNIT = 64
WIDTHS = (8, 4, 2, 1)
_MASKS = {width: sum(((1 << width) - 1) << (8 * byte) for byte in range(8)) for width in (4, 2, 1)}
"""The low bits of every byte of a 64-bit word."""
FIELDS: dict[int, tuple[int, ...]] = {0: (), 1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 8: (8,)}
"""Bits of a code -> widths of its fields, highest first."""


@dataclass(frozen=True)
class PlaneLayout:
    """Which rows of the contraction hold which field. Row order: by width (8, 4, 2, 1), then by component."""

    component: Tensor
    """Component of every row, int64 (rows,)."""
    place: Tensor
    """Bit position of every row's field in its code, int64 (rows,)."""
    rows: dict[int, int]
    """Rows of every width."""

    @staticmethod
    def of(bits: Tensor) -> PlaneLayout:
        """``bits``: int64 (components,), each one of ``FIELDS``."""
        found: dict[int, list[tuple[int, int]]] = {width: [] for width in WIDTHS}
        for component, count in enumerate(bits.tolist()):
            if count not in FIELDS:
                raise TensorNetError(f"a code of {count} bits has no field layout; use {sorted(FIELDS)}")
            below = count
            for width in FIELDS[count]:
                below -= width
                found[width].append((component, below))
        flat = [pair for width in WIDTHS for pair in found[width]]
        table = torch.tensor(flat, dtype=torch.int64).view(-1, 2)
        return PlaneLayout(table[:, 0], table[:, 1], {width: len(found[width]) for width in WIDTHS})

    @property
    def count(self) -> int:
        """Rows of the contraction."""
        return len(self.component)

    @property
    def bits_per_token(self) -> int:
        """Stored bits per token."""
        return sum(width * rows for width, rows in self.rows.items())

    def pack(self, codes: Tensor) -> dict[int, Tensor]:
        """Codes int64 (batch, tokens, components), tokens a multiple of ``UNIT`` -> packed bytes by width."""
        batch, tokens, _ = codes.shape
        if tokens % UNIT:
            raise TensorNetError(f"planes take multiples of {UNIT} tokens, was given {tokens}")
        fields = (codes[:, :, self.component] >> self.place).transpose(1, 2)
        packed, row = {}, 0
        for width in WIDTHS:
            part = fields[:, row : row + self.rows[width]] & ((1 << width) - 1)
            row += self.rows[width]
            spread = part.reshape(batch, self.rows[width], tokens // UNIT, 8 // width, UNIT * width // 8)
            shifts = torch.arange(0, 8, width, device=codes.device)[:, None]
            packed[width] = (spread << shifts).sum(-2).to(torch.uint8)
        return packed

    def unpack(self, packed: dict[int, Tensor], start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Units ``start .. stop`` -> field values as ``dtype``, (batch, rows, tokens)."""
        batch = packed[8].shape[0]
        units = stop - start
        out = torch.empty(batch, self.count, units * UNIT, dtype=dtype, device=packed[8].device)
        row = 0
        for width in WIDTHS:
            rows = self.rows[width]
            if not rows:
                continue
            fields = packed[width][:, :, start:stop]
            if width < 8:
                # Eight bytes at a time: a shift drags bits of the next byte along, which the mask drops again.
                lanes = fields.view(torch.int64)[..., None, :] >> _shifts(width, fields.device)
                fields = lanes.bitwise_and_(_MASKS[width]).view(torch.uint8)
            out[:, row : row + rows].copy_(fields.reshape(batch, rows, units * UNIT))
            row += rows
        return out


@cache
def _shifts(width: int, device: torch.device) -> Tensor:
    return torch.arange(0, 8, width, device=device)[:, None]


def append(old: dict[int, Tensor] | None, new: dict[int, Tensor]) -> dict[int, Tensor]:
    """Packed bytes of more tokens behind those held."""
    return new if old is None else {width: torch.cat([old[width], new[width]], 2) for width in WIDTHS}


def select(packed: dict[int, Tensor], rows: Tensor) -> dict[int, Tensor]:
    """Rows of the batch, int64 (rows,)."""
    return {width: part.index_select(0, rows.to(part.device)) for width, part in packed.items()}


def packed_nbytes(packed: dict[int, Tensor] | None) -> int:
    """Bytes held."""
    return 0 if packed is None else sum(part.nbytes for part in packed.values())
