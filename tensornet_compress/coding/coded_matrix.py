"""A matrix as integers with a step for each row and column, entropy-coded: ``W[r, i] = codes[r, i] * step_r * step_i``.

Steps are powers of ``2^(1/8)`` and foretold magnitudes powers of ``2^(1/4)``: two small integers for each row and column, which
are entropy-coded like the codes themselves. The bytes are those of row steps, column steps, row magnitudes and column
magnitudes, each led by its base (int32) and its length (uint32), and then those of the codes, see ``coding/coded_integers.py``.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tensornet_compress.coding.coded_integers import Integers, coded_bits, decode_integers, encode_integers, stored_states
from tensornet_compress.errors import CheckpointError

STEPS_PER_OCTAVE = 8
MAGNITUDES_PER_OCTAVE = 4
_FARTHEST = 2000
# 2^(k/8), written out: a decoder must have these very numbers on any machine.
ROOTS = np.array(
    [1.0, 1.0905077326652577, 1.189207115002721, 1.2968395546510096, 1.4142135623730951, 1.5422108254079407, 1.681792830507429,
     1.8340080864093424]
)  # fmt: skip


def step_sizes(exponents: Integers) -> NDArray[np.float64]:
    """Steps ``2^(exponents / 8)``, float64, each a float32 number."""
    whole = exponents >> 3
    return np.ldexp(ROOTS.astype(np.float32).astype(np.float64)[exponents & 7], whole)


@dataclass(frozen=True)
class CodedMatrix:
    """Codes int32 (rows, columns); steps in eighths and foretold mean magnitudes of codes in quarters of an octave, int32.

    ``states``: 8 where the codes are those of a trellis (``coding/trellis.py``); magnitudes are then those of its levels."""

    codes: Integers
    row_step: Integers
    column_step: Integers
    row_scale: Integers
    column_scale: Integers
    states: int = 0

    def to_bytes(self, overwrite: bool = False) -> NDArray[np.uint8]:
        """Everything as bytes. ``overwrite``: the codes may be lost."""
        sides = [_side(part) for part in (self.row_step, self.column_step, self.row_scale, self.column_scale)]
        codes = encode_integers(self.codes, self.row_scale, self.column_scale, self.states, overwrite)
        return np.concatenate([*sides, codes])

    @staticmethod
    def from_bytes(data: NDArray[np.uint8], rows: int, columns: int) -> CodedMatrix:
        """The inverse of ``to_bytes``.

        Raises:
            CheckpointError: the bytes are damaged.
        """
        sides = []
        for count in (rows, columns, rows, columns):
            side, data = _read_side(data, count)
            sides.append(side)
        row_step, column_step, row_scale, column_scale = sides
        codes = decode_integers(data, row_scale, column_scale)
        return CodedMatrix(codes, row_step, column_step, row_scale, column_scale, stored_states(data))

    @property
    def bits(self) -> float:
        """Bits of the codes alone, to within a few bytes, without coding them."""
        return coded_bits(self.codes, self.row_scale, self.column_scale, self.states)

    def to_dense(self) -> NDArray[np.float32]:
        """The matrix, float32."""
        scaled = self.codes * step_sizes(self.row_step)[:, None] * step_sizes(self.column_step)
        return scaled.astype(np.float32)


def _side(values: Integers) -> NDArray[np.uint8]:
    base = int(np.sort(values)[len(values) // 2]) if len(values) else 0
    coded = encode_integers((values - base)[None].astype(np.int32), np.zeros(1, np.int32), np.zeros(len(values), np.int32))
    return np.concatenate([np.array([base], "<i4").view(np.uint8), np.array([len(coded)], "<u4").view(np.uint8), coded])


def _read_side(data: NDArray[np.uint8], count: int) -> tuple[Integers, NDArray[np.uint8]]:
    if len(data) < 8:
        raise CheckpointError("a coded matrix ends before its steps; the file is damaged")
    base, length = int(data[:4].copy().view("<i4")[0]), int(data[4:8].copy().view("<u4")[0])
    if length > len(data) - 8:
        raise CheckpointError(f"a coded matrix has {len(data) - 8} bytes left of {length}; the file is damaged")
    values = decode_integers(data[8 : 8 + length], np.zeros(1, np.int32), np.zeros(count, np.int32))[0]
    if abs(base) > _FARTHEST or (np.abs(values) > _FARTHEST).any():
        raise CheckpointError(f"a coded matrix has steps beyond 2^{_FARTHEST}; the file is damaged")
    return values + np.int32(base), data[8 + length :]
