"""Fixed-rate codes that attention can contract against: integers cut in bit planes that unpack in a few wide operations.

A code of b bits is a sum of fields of 4, 2 and 1 bits. Because dequantisation is linear, every field is just one more row of
the contraction, scaled by its place value. Fields of one width lie together, ``(batch, rows, units, bytes)``: byte j of a
unit of 64 tokens holds tokens j, j + n, j + 2n ... (n bytes a unit), so that unpacking is shift-and-mask without any shuffle.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tensornet_compress.errors import TensorNetError

UNIT = 64
OPEN, CLOSED = 16, 64
"""Units of a chunk that is still copied when more come, and of one that is not; ``CLOSED`` is a multiple of ``OPEN``."""
WIDTHS = (4, 2, 1)
_MASKS = {width: sum(((1 << width) - 1) << (8 * byte) for byte in range(8)) for width in WIDTHS}
"""The low bits of every byte of a 64-bit word."""
FIELDS: dict[int, tuple[int, ...]] = {0: (), 1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 8: (4, 4)}
"""Bits of a code -> widths of its fields, highest first."""


@dataclass(frozen=True)
class PlaneLayout:
    """Which rows of the contraction hold which field. Row order: by width (4, 2, 1), then by component."""

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

    def to(self, device: torch.device) -> PlaneLayout:
        """For codes on another device."""
        return PlaneLayout(self.component.to(device), self.place.to(device), self.rows)

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

    def unpack(self, packed: dict[int, Tensor]) -> Tensor:
        """Packed bytes -> field values, uint8 0 .. 15, (batch, rows, tokens)."""
        batch, _, units, _ = packed[4].shape
        out = torch.empty(batch, self.count, units * UNIT, dtype=torch.uint8, device=packed[4].device)
        row = 0
        for width in WIDTHS:
            rows = self.rows[width]
            if not rows:
                continue
            # Eight bytes at a time: a shift drags bits of the next byte along, which the mask drops again.
            source = packed[width].view(torch.int64)
            lanes = out[:, row : row + rows].view(torch.int64).unflatten(-1, (units, 8 // width, width))
            for place in range(8 // width):
                torch.bitwise_right_shift(source, place * width, out=lanes[..., place, :])
            lanes.bitwise_and_(_MASKS[width])
            row += rows
        return out


@dataclass(frozen=True)
class Planes:
    """Packed bytes of a growing row of units, in chunks that are never rewritten once they hold ``CLOSED`` units.

    Appending copies at most the open last chunk (fewer than ``OPEN`` units) and every unit once more when chunks are joined, so
    its cost per token does not grow with the tokens held.
    """

    chunks: tuple[dict[int, Tensor], ...]
    """By width: uint8 (batch, rows, units, bytes)."""

    @staticmethod
    def of(packed: dict[int, Tensor]) -> Planes:
        """Packed bytes of any number of units."""
        total = _units(packed)
        starts = range(0, total, CLOSED)
        return Planes(tuple(_slice(packed, start, min(start + CLOSED, total)) for start in starts))

    def append(self, packed: dict[int, Tensor]) -> Planes:
        """Packed bytes of more tokens behind those held."""
        chunks, done, total = list(self.chunks), 0, _units(packed)
        while done < total:
            held = _units(chunks[-1]) if chunks else OPEN
            room = min(OPEN - held, total - done) if held < OPEN else 0
            if room:
                chunks[-1] = _join([chunks[-1], _slice(packed, done, done + room)])
            else:
                room = min(CLOSED, total - done)
                chunks.append(_slice(packed, done, done + room))
            done += room
            last = chunks[-(CLOSED // OPEN) :]
            if [_units(chunk) for chunk in last] == [OPEN] * (CLOSED // OPEN):
                chunks[-len(last) :] = [_join(last)]
        return Planes(tuple(chunks))

    def whole(self) -> dict[int, Tensor]:
        """All units in one tensor per width."""
        return _join(list(self.chunks))

    def first(self, units: int) -> Planes:
        """A copy of the first ``units``."""
        return Planes.of(_slice(self.whole(), 0, units))

    def select(self, rows: Tensor) -> Planes:
        """Rows of the batch, int64 (rows,)."""
        return Planes(
            tuple({width: part.index_select(0, rows.to(part.device)) for width, part in chunk.items()} for chunk in self.chunks)
        )

    def to(self, device: torch.device) -> Planes:
        """On another device."""
        return Planes(
            tuple({width: part.to(device, non_blocking=True) for width, part in chunk.items()} for chunk in self.chunks)
        )

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(part.nbytes for chunk in self.chunks for part in chunk.values())


def _units(packed: dict[int, Tensor]) -> int:
    return packed[4].shape[2]


def _slice(packed: dict[int, Tensor], start: int, stop: int) -> dict[int, Tensor]:
    if (start, stop) == (0, _units(packed)):
        return packed
    return {width: part[:, :, start:stop].clone(memory_format=torch.contiguous_format) for width, part in packed.items()}


def _join(chunks: list[dict[int, Tensor]]) -> dict[int, Tensor]:
    return chunks[0] if len(chunks) == 1 else {width: torch.cat([chunk[width] for chunk in chunks], 2) for width in WIDTHS}
