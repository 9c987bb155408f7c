"""A matrix of integers as entropy-coded bytes: every entry takes its statistics from a scale that both sides know.

The mean magnitude of entry ``(r, i)`` is foretold as ``2^((row[r] + column[i]) / 4)``. Entries of one foretold scale are a
class; each class names a law of ``coding/laws.py`` and a number of low bits that are stored as they are. Codes too rare for a
symbol of their own are escaped and stored whole.

=================  ====================================================================================
bytes              content (whole numbers are little-endian)
=================  ====================================================================================
8                  number of classes uint16, states uint16 (0, or 8 of a trellis), number of escapes uint32
2 per class        law uint8, low bits uint8; with a trellis those of all classes twice, for both quantisers
4 per escape       the escaped high parts, int32, by rows
4                  of a trellis only: bytes of the low bits, uint32
as many as needed  low bits of all entries of classes that have some, by rows, from the lowest bit up
the rest           symbols of the high parts, see ``coding/rans.py``
=================  ====================================================================================

With a trellis (``coding/trellis.py``) entries are levels of one of two quantisers, which the levels above tell.
"""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

from tensornet_compress.coding import laws, rans, trellis
from tensornet_compress.coding.laws import ESCAPE, HALF, HIGHEST
from tensornet_compress.errors import CheckpointError, CodeError

_HEADER = 8
_MOST_CLASSES = 1024
_MOST_LOW_BITS = 24
_LARGEST = 1 << 30
Integers = NDArray[np.int32]


def encode_integers(
    codes: Integers, row_scale: Integers, column_scale: Integers, states: int = 0, overwrite: bool = False
) -> NDArray[np.uint8]:
    """Codes int32 (rows, columns) -> bytes; ``row_scale`` (rows,) and ``column_scale`` (columns,) foretell magnitudes, in whole
    quarter octaves. ``states``: 8 where the codes are those of a trellis, and magnitudes those of its levels.
    ``overwrite``: the codes may be lost, which saves as much memory as they take.

    Raises:
        CodeError: a code is beyond 2^30.
    """
    rows, columns, classes = _classes(row_scale, column_scale)
    if codes.size and max(int(codes.max()), -int(codes.min())) > _LARGEST:
        raise CodeError(f"a code of {int(np.abs(codes).max()):,} is too large to store; the step is too fine for this tensor")
    level, side = _levels(codes, states, overwrite)
    law, low_bits, _ = _fitted(level, side, rows, columns, classes, states)
    tables = _tables(law, classes)
    available = tables.frequency[:, HALF : HALF + HALF + 1] > 0
    symbols = np.empty(codes.shape, np.uint8)
    escaped = np.empty(codes.size, np.int32)
    low = np.zeros(_low_bit_count(side, rows, columns, low_bits, classes) + 7 >> 3, np.uint8)
    count = _split(level, side, rows, columns, classes, low_bits, available, symbols, escaped, low)
    del level
    header = np.concatenate([np.array([classes, states], "<u2").view(np.uint8), np.array([count], "<u4").view(np.uint8)])
    named = np.stack([law, low_bits], 1).astype(np.uint8).ravel()
    stream = rans.encode(symbols, rows, columns, tables, _lanes(symbols.size), side if states else None)
    length = np.array([len(low)] if states else [], "<u4").view(np.uint8)
    return np.concatenate([header, named, escaped[:count].astype("<i4").view(np.uint8), length, low, stream])


def decode_integers(data: NDArray[np.uint8], row_scale: Integers, column_scale: Integers) -> Integers:
    """The inverse of ``encode_integers``.

    Raises:
        CheckpointError: the bytes are damaged.
    """
    rows, columns, classes = _classes(row_scale, column_scale)
    states = stored_states(data)
    kinds = 2 * classes if states else classes
    if len(data) < _HEADER + 2 * kinds or int(data[:2].view("<u2")[0]) != classes:
        raise CheckpointError(f"{len(data)} bytes cannot hold codes of {classes} classes; the file is damaged")
    count = int(data[4:8].view("<u4")[0])
    law, low_bits = data[_HEADER : _HEADER + 2 * kinds].reshape(-1, 2).astype(np.int64).T
    if (law >= laws.LAWS).any() or (low_bits > _MOST_LOW_BITS).any() or count > len(row_scale) * len(column_scale):
        raise CheckpointError("coded integers name statistics that do not exist; the file is damaged")
    start = _HEADER + 2 * kinds
    codes = np.empty((len(rows), len(columns)), np.int32)
    escaped = data[start : start + 4 * count].copy().view("<i4").astype(np.int32) if len(data) >= start + 4 * count else None
    if escaped is None:
        raise CheckpointError(f"coded integers end after {len(data)} bytes, before their escapes; the file is damaged")
    start += 4 * count
    lanes = _lanes(codes.size)
    if states:
        found = _read_trellis(data[start:], rows, columns, classes, law, low_bits, escaped, lanes, codes)
    else:
        end = start + (_low_bit_count(np.zeros((1, 1), np.uint8), rows, columns, low_bits, classes) + 7 >> 3)
        if len(data) < end:
            raise CheckpointError(f"coded integers end after {len(data)} bytes, at least {end} are needed; the file is damaged")
        symbols = rans.decode(data[end:], rows, columns, _tables(law, classes), lanes)
        found = _joined(symbols, rows, columns, low_bits, escaped, data[start:end], codes)
    if found != count:
        raise CheckpointError(f"coded integers do not name the {count} escaped codes that they hold; the file is damaged")
    return codes


def stored_states(data: NDArray[np.uint8]) -> int:
    """States of the trellis of coded integers: 8, or 0 without one.

    Raises:
        CheckpointError: the bytes are damaged.
    """
    states = int(data[2:4].view("<u2")[0]) if len(data) >= _HEADER else 0
    if len(data) < _HEADER or states not in (0, trellis.STATES):
        raise CheckpointError(f"{len(data)} bytes of coded integers name a trellis of {states} states; the file is damaged")
    return states


def coded_bits(codes: Integers, row_scale: Integers, column_scale: Integers, states: int = 0) -> float:
    """Bits that ``encode_integers`` will take for the entries, but for a few bytes of lanes and header."""
    rows, columns, classes = _classes(row_scale, column_scale)
    return float(_fitted(*_levels(codes, states), rows, columns, classes, states)[2])


def scale_bits(lowest: int, classes: int, odd: bool = False) -> NDArray[np.float64]:
    """Expected bits of each magnitude up to HALF under a middling law of each foretold scale, float64 (classes, HALF + 1): what
    a rate-aware quantiser goes by before the laws are fitted. ``odd``: of the other quantiser of a trellis."""
    offset = lowest + np.arange(classes) - laws.LOWEST * laws.PER_OCTAVE
    middling = laws.SHAPES.index(1.5)
    return laws.all_bits(odd)[[laws.law_number(int(s), middling) for s in offset.clip(0, laws.SCALES - 1)], : HALF + 1]


def _classes(row_scale: Integers, column_scale: Integers) -> tuple[NDArray[np.int64], NDArray[np.int64], int]:
    """Class of an entry = a number of its row + one of its column, both from zero; and how many classes there are."""
    if not len(row_scale) or not len(column_scale):
        return np.zeros(len(row_scale), np.int64), np.zeros(len(column_scale), np.int64), 1
    rows = row_scale.astype(np.int64) - int(row_scale.min())
    columns = column_scale.astype(np.int64) - int(column_scale.min())
    classes = int(rows.max() + columns.max()) + 1
    if classes > _MOST_CLASSES:
        raise CheckpointError(
            f"coded integers of {classes} classes of scale, at most {_MOST_CLASSES} can be; the file is damaged"
        )
    return rows, columns, classes


def _levels(codes: Integers, states: int, overwrite: bool = False) -> tuple[Integers, NDArray[np.uint8]]:
    """What is coded of codes, and of which quantiser each is: all of one without a trellis."""
    codes = np.ascontiguousarray(codes, np.int32)
    return trellis.levels(codes, overwrite) if states else (codes, np.zeros(codes.shape, np.uint8))


def _fitted(
    level: Integers,
    side: NDArray[np.uint8],
    rows: NDArray[np.int64],
    columns: NDArray[np.int64],
    classes: int,
    states: int,
) -> tuple[NDArray[np.int64], NDArray[np.int64], float]:
    """Law and low bits of each class (and quantiser), and the bits that all entries then take."""
    kinds = 2 * classes if states else classes
    total, count = _magnitudes(level, side, rows, columns, classes, kinds)
    mean = np.maximum(total / np.maximum(count, 1), 2.0**-20)
    low_bits = np.clip(np.ceil(np.log2(mean) - HIGHEST), 0, _MOST_LOW_BITS).astype(np.int64)
    seen = _histograms(level, side, rows, columns, classes, low_bits)
    bits = np.concatenate([part @ laws.all_bits(odd).T for odd, part in ((False, seen[:classes]), (True, seen[classes:]))])
    return bits.argmin(1), low_bits, float(bits.min(1).sum()) + float(count @ low_bits)


def _tables(law: NDArray[np.int64], classes: int) -> rans.Tables:
    """Those of all classes, and behind them those of the other quantiser of a trellis."""
    found = [laws.frequencies(int(number), place >= classes) for place, number in enumerate(law)]
    return rans.Tables(np.stack(found).astype(np.uint32))


def _read_trellis(
    data: NDArray[np.uint8],
    rows: NDArray[np.int64],
    columns: NDArray[np.int64],
    classes: int,
    law: NDArray[np.int64],
    low_bits: NDArray[np.int64],
    escaped: Integers,
    lanes: int,
    codes: Integers,
) -> int:
    """Fill the codes of a trellis; gives the number of escapes that they name, or one more than there are."""
    length = int(data[:4].view("<u4")[0]) if len(data) >= 4 else 0
    stream = data[4 + length :]
    if len(data) < 4 + length or len(stream) < 4 * lanes or len(stream) % 2:
        raise CheckpointError(f"codes of a trellis cannot have {len(data)} bytes after their escapes; the file is damaged")
    # Damaged levels may ask for more low bits than there are.
    most = codes.size * int(low_bits.max(initial=0)) // 8 + 8
    low = np.concatenate([data[4 : 4 + length], np.zeros(max(0, most - length), np.uint8)])
    state = stream[: 4 * lanes].copy().view("<u4").astype(np.uint32)
    words = stream[4 * lanes :].copy().view("<u2").astype(np.uint16)
    padded = np.concatenate([words, np.zeros(2, np.uint16)])
    slots = _tables(law, classes).slots
    used, count = trellis.decode(
        padded, len(words), state, rows, columns, slots, classes, trellis.NEXT, low_bits, escaped, low, codes
    )
    if count <= len(escaped) and (used != len(words) or (state != 1 << 16).any()):
        raise CheckpointError(f"codes of a trellis do not end where {len(words)} words do; the file is damaged")
    return int(count)


def _lanes(symbols: int) -> int:
    """Few enough that what they cost, two bytes each, is a five-hundredth of a bit per symbol."""
    return min(max(symbols // 8192, 1), 32)


def _low_bit_count(
    side: NDArray[np.uint8], rows: NDArray[np.int64], columns: NDArray[np.int64], low_bits: NDArray[np.int64], classes: int
) -> int:
    """Low bits of all entries together."""
    if not low_bits.any():
        return 0
    if len(low_bits) > classes:
        return int(_counted_low_bits(side, rows, columns, low_bits, classes))
    in_row, in_column = np.bincount(rows, minlength=len(low_bits)), np.bincount(columns, minlength=len(low_bits))
    entries = np.convolve(in_row, in_column)[: len(low_bits)]
    return int(entries @ low_bits)


@njit(cache=True, nogil=True)
def _counted_low_bits(side, rows, columns, low_bits, classes):  # type: ignore[no-untyped-def]
    total = 0
    for r in range(side.shape[0]):
        for i in range(side.shape[1]):
            total += low_bits[rows[r] + columns[i] + classes * side[r, i]]
    return total


@njit(cache=True, nogil=True)
def _magnitudes(level, side, rows, columns, classes, kinds):  # type: ignore[no-untyped-def]
    """Sum of magnitudes and number of entries of each class (and quantiser)."""
    total, count = np.zeros(kinds), np.zeros(kinds, np.int64)
    for r in range(level.shape[0]):
        for i in range(level.shape[1]):
            kind = rows[r] + columns[i] + classes * side[r, i]
            total[kind] += abs(level[r, i])
            count[kind] += 1
    return total, count


@njit(cache=True, nogil=True)
def _histograms(level, side, rows, columns, classes, low_bits):  # type: ignore[no-untyped-def]
    """How often each magnitude of the high part occurs in each class; the last column counts what must be escaped."""
    seen = np.zeros((len(low_bits), HALF + 2))
    for r in range(level.shape[0]):
        for i in range(level.shape[1]):
            kind = rows[r] + columns[i] + classes * side[r, i]
            shift = low_bits[kind]
            high = abs((level[r, i] + ((1 << shift) >> 1)) >> shift)
            seen[kind, min(high, HALF + 1)] += 1
    return seen


@njit(cache=True, nogil=True)
def _split(level, side, rows, columns, classes, low_bits, available, symbols, escaped, low):  # type: ignore[no-untyped-def]
    """Fill symbols, escaped high parts and the stream of low bits; gives the number of escapes."""
    count = place = 0
    for r in range(level.shape[0]):
        for i in range(level.shape[1]):
            kind = rows[r] + columns[i] + classes * side[r, i]
            shift = low_bits[kind]
            moved = np.int64(level[r, i]) + ((1 << shift) >> 1)
            high = moved >> shift
            rest = moved - (high << shift)
            for bit in range(shift):
                low[place >> 3] |= ((rest >> bit) & 1) << (place & 7)
                place += 1
            if abs(high) <= HALF and available[kind, abs(high)]:
                symbols[r, i] = high + HALF
            else:
                symbols[r, i] = ESCAPE
                escaped[count] = high
                count += 1
    return count


@njit(cache=True, nogil=True)
def _joined(symbols, rows, columns, low_bits, escaped, low, codes):  # type: ignore[no-untyped-def]
    """Fill ``codes``; gives the number of escapes that the symbols name, or one more than there are."""
    count = place = 0
    for r in range(codes.shape[0]):
        for i in range(codes.shape[1]):
            shift = low_bits[rows[r] + columns[i]]
            high = np.int64(symbols[r, i]) - HALF
            if symbols[r, i] == ESCAPE:
                if count >= len(escaped):
                    return count + 1
                high = np.int64(escaped[count])
                count += 1
            rest = np.int64(0)
            for bit in range(shift):
                rest |= np.int64((low[place >> 3] >> (place & 7)) & 1) << bit
                place += 1
            codes[r, i] = (high << shift) + rest - ((1 << shift) >> 1)
    return count
