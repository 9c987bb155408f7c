"""Range asymmetric numeral systems (rANS, 0902.0271 / 1311.2540), interleaved over many lanes.

Symbols form a grid, and each takes its frequency table from the sum of a number of its row and one of its column, which both
sides know. States live in [2**16, 2**32) and are renormalised by 16-bit words; symbol ``i`` of the grid belongs to lane
``i % lanes``, and all lanes share one word stream. The lanes are independent of each other, so that a processor works on
several at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numba import njit
from numpy.typing import NDArray

from tensornet_compress.errors import CheckpointError

PRECISION = 12
TOTAL = 1 << PRECISION
_SYMBOLS_PER_LANE = 2048
_MAX_LANES = 4096


@dataclass(frozen=True)
class Tables:
    """Frequency tables of one alphabet of at most 256 symbols: uint32 (tables, symbols), each row sums to ``2**PRECISION``."""

    frequency: NDArray[np.uint32]

    @staticmethod
    def from_frequencies(frequency: NDArray[np.integer]) -> Tables:
        """Refuse rows that do not sum up, or whose frequencies are negative.

        Raises:
            CheckpointError: the frequencies are no tables.
        """
        counts = np.asarray(frequency)
        if counts.ndim != 2 or counts.shape[1] > 256 or counts.min() < 0 or (counts.sum(1, dtype=np.int64) != TOTAL).any():
            raise CheckpointError(f"symbol frequencies of shape {counts.shape} do not sum to {TOTAL}; the file is damaged")
        return Tables(counts.astype(np.uint32))

    @cached_property
    def start(self) -> NDArray[np.uint32]:
        """First slot of each symbol, uint32 (tables, symbols)."""
        start = np.zeros_like(self.frequency)
        np.cumsum(self.frequency[:, :-1], axis=1, out=start[:, 1:])
        return start

    @cached_property
    def slots(self) -> NDArray[np.uint32]:
        """What a decoder needs of each slot in one number: frequency - 1, place within the symbol, symbol (12, 12, 8 bits)."""
        return _slots(self.frequency)


def normalise(weights: NDArray[np.floating] | NDArray[np.integer]) -> NDArray[np.uint32]:
    """Weights (tables, symbols) -> frequencies that sum to ``2**PRECISION``; a symbol of weight zero keeps frequency zero."""
    scaled = weights / weights.sum(1, keepdims=True) * TOTAL
    counts = np.where(weights > 0, np.maximum(np.rint(scaled), 1), 0).astype(np.int64)
    rows = np.arange(len(counts))
    while (excess := counts.sum(1) - TOTAL).any():
        largest = counts.argmax(1)
        counts[rows, largest] -= np.minimum(excess, counts[rows, largest] - 1)
    return counts.astype(np.uint32)


def lane_count(symbols: int) -> int:
    """Lanes used for that many symbols: each costs four bytes, and more lanes run faster."""
    return int(np.clip(symbols // _SYMBOLS_PER_LANE, 1, _MAX_LANES))


def encode(
    symbols: NDArray[np.uint8],
    row_table: NDArray[np.integer],
    column_table: NDArray[np.integer],
    tables: Tables,
    lanes: int | None = None,
    side: NDArray[np.uint8] | None = None,
) -> NDArray[np.uint8]:
    """Symbols (rows, columns), table numbers of rows and columns -> bytes: lane states, then the word stream.

    A symbol must have a non-zero frequency in its table. ``lanes``: ``lane_count`` of them unless given. Symbols whose
    ``side`` (rows, columns) is 1 take their tables from the second half of ``tables``; ``decode`` does not know such streams.
    """
    state = np.full(lanes or lane_count(symbols.size), 1 << 16, np.uint32)
    words = np.empty(2 * symbols.size + 1, np.uint16)
    packed = ((tables.frequency << 12) | tables.start).astype(np.uint32)
    grid = np.ascontiguousarray(symbols, np.uint8)
    sides = np.zeros((1, 1), np.uint8) if side is None else side
    first = _encode(grid, row_table.astype(np.int64), column_table.astype(np.int64), sides, packed, state, words)
    return np.concatenate([state.astype("<u4").view(np.uint8), words[first:].astype("<u2").view(np.uint8)])


def decode(
    payload: NDArray[np.uint8],
    row_table: NDArray[np.integer],
    column_table: NDArray[np.integer],
    tables: Tables,
    lanes: int | None = None,
) -> NDArray[np.uint8]:
    """The inverse of ``encode``: uint8 (rows, columns).

    Raises:
        CheckpointError: the bytes end too early or do not end where the last symbol does.
    """
    count = len(row_table) * len(column_table)
    lanes = lanes or lane_count(count)
    if len(payload) < 4 * lanes or len(payload) % 2:
        raise CheckpointError(f"an entropy-coded block of {count} symbols cannot have {len(payload)} bytes; it is damaged")
    state = payload[: 4 * lanes].copy().view("<u4").astype(np.uint32)
    words = payload[4 * lanes :].copy().view("<u2").astype(np.uint16)
    # As many words again as lanes, so that the loop may look ahead without a check; reading them is seen afterwards.
    padded = np.concatenate([words, np.zeros(lanes, np.uint16)])
    symbols = np.empty((len(row_table), len(column_table)), np.uint8)
    used = _decode(
        padded, len(words), state, row_table.astype(np.uint32), column_table.astype(np.uint32), tables.slots, symbols
    )
    if used != len(words) or (state != 1 << 16).any():
        raise CheckpointError(f"an entropy-coded block of {count} symbols does not end where it should; it is damaged")
    return symbols


@njit(cache=True, nogil=True)
def _slots(frequency):  # type: ignore[no-untyped-def]
    slots = np.empty(frequency.shape[0] * TOTAL, np.uint32)
    at = 0
    for table in range(frequency.shape[0]):
        for symbol in range(frequency.shape[1]):
            count = frequency[table, symbol]
            for place in range(count):
                slots[at] = ((count - np.uint32(1)) << np.uint32(20)) | np.uint32(place << 8) | np.uint32(symbol)
                at += 1
    return slots


@njit(cache=True, nogil=True)
def _encode(symbols, row_table, column_table, side, packed, state, words):  # type: ignore[no-untyped-def]
    """Fill ``words`` from its end; gives the index of the first one. Coding runs backwards, so that decoding runs forwards."""
    rows, columns = symbols.shape
    lanes = len(state)
    first = len(words)
    sided, second = side.shape == symbols.shape, len(packed) >> 1
    lane = (rows * columns - 1) % lanes
    for row in range(rows - 1, -1, -1):
        for column in range(columns - 1, -1, -1):
            kind = row_table[row] + column_table[column]
            if sided and side[row, column]:
                kind += second
            entry = packed[kind, symbols[row, column]]
            frequency = np.uint64(entry >> np.uint32(12))
            value = np.uint64(state[lane])
            if value >= frequency << np.uint64(20):
                first -= 1
                words[first] = np.uint16(value & np.uint64(65535))
                value >>= np.uint64(16)
            quotient = value // frequency
            remainder = value - quotient * frequency
            state[lane] = np.uint32((quotient << np.uint64(12)) + remainder + np.uint64(entry & np.uint32(4095)))
            lane = lane - 1 if lane else lanes - 1
    return first


@njit(cache=True, nogil=True)
def _decode(words, available, state, row_table, column_table, slots, symbols):  # type: ignore[no-untyped-def]
    """Fill ``symbols``; gives the number of words that were read (of damaged input perhaps more than there are)."""
    rows, columns = symbols.shape
    lanes = len(state)
    position = lane = 0
    for row in range(rows):
        table = row_table[row]
        column = 0
        while column < columns:
            run = min(columns - column, lanes - lane)
            if position > available:
                return position
            for step in range(run):
                value = state[lane + step]
                entry = slots[((table + column_table[column + step]) << np.uint32(12)) + (value & np.uint32(4095))]
                value = ((entry >> np.uint32(20)) + np.uint32(1)) * (value >> np.uint32(12)) + (
                    (entry >> np.uint32(8)) & np.uint32(4095)
                )
                low = value < np.uint32(65536)
                value = (value << np.uint32(16)) | np.uint32(words[position]) if low else value
                position += low
                state[lane + step] = value
                symbols[row, column + step] = np.uint8(entry & np.uint32(255))
            column += run
            lane += run
            if lane == lanes:
                lane = 0
    return position
