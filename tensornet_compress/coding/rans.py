"""Range asymmetric numeral systems (rANS, 0902.0271 / 1311.2540), interleaved over many lanes so that NumPy runs it in bulk.

Every symbol has its own frequency table, chosen by an index known to both sides. States live in [2**16, 2**32) and are
renormalised by 16-bit words; all lanes share one word stream.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tensornet_compress.errors import CheckpointError

PRECISION = 12
_TOTAL = 1 << PRECISION
_SYMBOLS_PER_LANE = 2048
_MAX_LANES = 4096


@dataclass(frozen=True)
class Tables:
    """Frequency tables of one alphabet; each row of ``frequency`` sums to ``2**PRECISION``."""

    frequency: NDArray[np.uint32]
    start: NDArray[np.uint32]
    symbol_of_slot: NDArray[np.uint8]

    @staticmethod
    def from_frequencies(frequency: NDArray[np.integer]) -> Tables:
        """``frequency``: integers (tables, symbols), at most 256 symbols."""
        counts = frequency.astype(np.uint32)
        start = np.zeros_like(counts)
        np.cumsum(counts[:, :-1], axis=1, out=start[:, 1:])
        slots = np.empty((len(counts), _TOTAL), np.uint8)
        for row, count in enumerate(counts):
            slots[row] = np.repeat(np.arange(counts.shape[1], dtype=np.uint8), count)
        return Tables(counts, start, slots)


def normalise(weights: NDArray[np.floating]) -> NDArray[np.uint32]:
    """Weights (tables, symbols) -> frequencies that sum to ``2**PRECISION``; a symbol of weight zero keeps frequency zero."""
    scaled = weights / weights.sum(1, keepdims=True) * _TOTAL
    counts = np.where(weights > 0, np.maximum(np.rint(scaled), 1), 0).astype(np.int64)
    rows = np.arange(len(counts))
    while (excess := counts.sum(1) - _TOTAL).any():
        largest = counts.argmax(1)
        counts[rows, largest] -= np.minimum(excess, counts[rows, largest] - 1)
    return counts.astype(np.uint32)


def lane_count(symbols: int) -> int:
    """Lanes used for that many symbols: each costs four bytes, and more lanes run faster."""
    return int(np.clip(symbols // _SYMBOLS_PER_LANE, 1, _MAX_LANES))


def encode(symbols: NDArray[np.uint8], table: NDArray[np.integer], tables: Tables) -> NDArray[np.uint8]:
    """Symbols (n,), the table of each (n,) -> bytes: lane states, then the word stream.

    A symbol must have a non-zero frequency in its table.
    """
    lanes = lane_count(len(symbols))
    steps = -(-len(symbols) // lanes)
    frequency, start = (
        _spread(tables.frequency[table, symbols], steps, lanes),
        _spread(tables.start[table, symbols], steps, lanes),
    )
    # A padding symbol covers the whole range: coding it changes nothing and emits nothing.
    frequency.reshape(-1)[len(symbols) :] = _TOTAL
    state = np.full(lanes, 1 << 16, np.uint64)
    emitted: list[NDArray[np.uint16]] = []
    limit_shift, precision, word = np.uint64(32 - PRECISION), np.uint64(PRECISION), np.uint64(16)
    for step in range(steps - 1, -1, -1):
        freq = frequency[step].astype(np.uint64)
        full = state >= (freq << limit_shift)
        emitted.append(state[full].astype(np.uint16))
        state = np.where(full, state >> word, state)
        quotient = state // freq
        state = (quotient << precision) + (state - quotient * freq) + start[step]
    stream = np.concatenate(emitted[::-1]) if emitted else np.zeros(0, np.uint16)
    return np.concatenate([state.astype("<u4").view(np.uint8), stream.astype("<u2").view(np.uint8)])


def decode(payload: NDArray[np.uint8], table: NDArray[np.integer], tables: Tables) -> NDArray[np.uint8]:
    """The inverse of ``encode``; ``table`` gives the table of each symbol, (n,).

    Raises:
        CheckpointError: the bytes end too early or do not end where the last symbol does.
    """
    count = len(table)
    lanes = lane_count(count)
    steps = -(-count // lanes)
    if len(payload) < 4 * lanes or len(payload) % 2:
        raise CheckpointError(f"an entropy-coded block of {count} symbols cannot have {len(payload)} bytes; it is damaged")
    state = payload[: 4 * lanes].copy().view("<u4").astype(np.uint32)
    words = payload[4 * lanes :].copy().view("<u2").astype(np.uint32)
    which = _spread(table.astype(np.int64), steps, lanes)
    live = count - (steps - 1) * lanes
    symbols = np.empty((steps, lanes), np.uint8)
    slots, frequencies, starts = (
        tables.symbol_of_slot.reshape(-1),
        tables.frequency.reshape(-1),
        tables.start.reshape(-1),
    )
    width, mask = tables.frequency.shape[1], np.uint32(_TOTAL - 1)
    position = 0
    for step in range(steps):
        end = lanes if step < steps - 1 else live
        now, rows = state[:end], which[step, :end]
        slot = now & mask
        symbol = slots[rows * _TOTAL + slot]
        cell = rows * width + symbol
        now = frequencies[cell] * (now >> np.uint32(PRECISION)) + slot - starts[cell]
        need = np.flatnonzero(now < (1 << 16))
        if position + len(need) > len(words):
            raise CheckpointError(f"an entropy-coded block of {count} symbols ends too early; it is damaged")
        now[need] = (now[need] << np.uint32(16)) | words[position : position + len(need)]
        position += len(need)
        state[:end] = now
        symbols[step, :end] = symbol
    if position != len(words) or (state != 1 << 16).any():
        raise CheckpointError(f"an entropy-coded block of {count} symbols does not end where it should; it is damaged")
    return symbols.reshape(-1)[:count]


def _spread(values: NDArray[Any], steps: int, lanes: int) -> NDArray[Any]:
    wide = np.zeros(steps * lanes, values.dtype)
    wide[: len(values)] = values
    return wide.reshape(steps, lanes)
