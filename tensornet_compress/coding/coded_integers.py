"""A matrix of integers as entropy-coded bytes: every entry takes its statistics from a scale that both sides know.

The mean magnitude of entry ``(r, i)`` is foretold as ``2^((row[r] + column[i]) / 4)``. Entries of one foretold scale are a
class; each class names a law of ``coding/laws.py`` and a number of low bits that are stored as they are. Codes too rare for a
symbol of their own are escaped and stored whole.

=================  ====================================================================================
bytes              content (whole numbers are little-endian)
=================  ====================================================================================
8                  number of classes uint16, zero uint16, number of escapes uint32
2 per class        law uint8, low bits uint8
4 per escape       the escaped high parts, int32, by rows
as many as needed  low bits of all entries of classes that have some, by rows, from the lowest bit up
the rest           symbols of the high parts, see ``coding/rans.py``
=================  ====================================================================================
"""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

from tensornet_compress.coding import laws, rans
from tensornet_compress.coding.laws import ESCAPE, HALF, HIGHEST
from tensornet_compress.errors import CheckpointError, CodeError

_HEADER = 8
_MOST_CLASSES = 1024
_MOST_LOW_BITS = 24
_LARGEST = 1 << 30
Integers = NDArray[np.int32]


def encode_integers(codes: Integers, row_scale: Integers, column_scale: Integers) -> NDArray[np.uint8]:
    """Codes int32 (rows, columns) -> bytes; ``row_scale`` (rows,) and ``column_scale`` (columns,) foretell magnitudes, in whole
    quarter octaves.

    Raises:
        CodeError: a code is beyond 2^30.
    """
    rows, columns, classes = _classes(row_scale, column_scale)
    if codes.size and max(int(codes.max()), -int(codes.min())) > _LARGEST:
        raise CodeError(f"a code of {int(np.abs(codes).max()):,} is too large to store; the step is too fine for this tensor")
    law, low_bits, _ = _fitted(codes, rows, columns, classes)
    tables = _tables(law)
    available = tables.frequency[:, HALF : HALF + HALF + 1] > 0
    symbols = np.empty(codes.shape, np.uint8)
    escaped = np.empty(codes.size, np.int32)
    low = np.zeros(int(_low_bit_count(rows, columns, low_bits)) + 7 >> 3, np.uint8)
    count = _split(np.ascontiguousarray(codes, np.int32), rows, columns, low_bits, available, symbols, escaped, low)
    header = np.concatenate([np.array([classes, 0], "<u2").view(np.uint8), np.array([count], "<u4").view(np.uint8)])
    named = np.stack([law, low_bits], 1).astype(np.uint8).ravel()
    stream = rans.encode(symbols, rows, columns, tables, _lanes(symbols.size))
    return np.concatenate([header, named, escaped[:count].astype("<i4").view(np.uint8), low, stream])


def decode_integers(data: NDArray[np.uint8], row_scale: Integers, column_scale: Integers) -> Integers:
    """The inverse of ``encode_integers``.

    Raises:
        CheckpointError: the bytes are damaged.
    """
    rows, columns, classes = _classes(row_scale, column_scale)
    if len(data) < _HEADER + 2 * classes or int(data[:2].view("<u2")[0]) != classes:
        raise CheckpointError(f"{len(data)} bytes cannot hold codes of {classes} classes; the file is damaged")
    count = int(data[4:8].view("<u4")[0])
    law, low_bits = data[_HEADER : _HEADER + 2 * classes].reshape(-1, 2).astype(np.int64).T
    if (law >= laws.LAWS).any() or (low_bits > _MOST_LOW_BITS).any() or count > len(row_scale) * len(column_scale):
        raise CheckpointError("coded integers name statistics that do not exist; the file is damaged")
    low_bytes = int(_low_bit_count(rows, columns, low_bits)) + 7 >> 3
    start = _HEADER + 2 * classes
    ends = start + 4 * count, start + 4 * count + low_bytes
    if len(data) < ends[1]:
        raise CheckpointError(f"coded integers end after {len(data)} bytes, at least {ends[1]} are needed; the file is damaged")
    symbols = rans.decode(data[ends[1] :], rows, columns, _tables(law), _lanes(len(rows) * len(columns)))
    codes = np.empty(symbols.shape, np.int32)
    escaped = data[start : ends[0]].copy().view("<i4").astype(np.int32)
    if _joined(symbols, rows, columns, low_bits, escaped, data[ends[0] : ends[1]], codes) != count:
        raise CheckpointError(f"coded integers do not name the {count} escaped codes that they hold; the file is damaged")
    return codes


def coded_bits(codes: Integers, row_scale: Integers, column_scale: Integers) -> float:
    """Bits that ``encode_integers`` will take for the entries, but for a few bytes of lanes and header."""
    rows, columns, classes = _classes(row_scale, column_scale)
    return float(_fitted(codes, rows, columns, classes)[2])


def scale_bits(lowest: int, classes: int) -> NDArray[np.float64]:
    """Expected bits of each magnitude up to HALF under a middling law of each foretold scale, float64 (classes, HALF + 1): what
    a rate-aware quantiser goes by before the laws are fitted."""
    offset = lowest + np.arange(classes) - laws.LOWEST * laws.PER_OCTAVE
    middling = laws.SHAPES.index(1.5)
    return laws.all_bits()[[laws.law_number(int(s), middling) for s in offset.clip(0, laws.SCALES - 1)], : HALF + 1]


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


def _fitted(
    codes: Integers, rows: NDArray[np.int64], columns: NDArray[np.int64], classes: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], float]:
    """Law and low bits of each class, and the bits that all entries then take."""
    codes = np.ascontiguousarray(codes, np.int32)
    total, count = _magnitudes(codes, rows, columns, classes)
    mean = np.maximum(total / np.maximum(count, 1), 2.0**-20)
    low_bits = np.clip(np.ceil(np.log2(mean) - HIGHEST), 0, _MOST_LOW_BITS).astype(np.int64)
    seen = _histograms(codes, rows, columns, low_bits)
    bits = seen @ laws.all_bits().T
    return bits.argmin(1), low_bits, float(bits.min(1).sum()) + float(count @ low_bits)


def _tables(law: NDArray[np.int64]) -> rans.Tables:
    return rans.Tables(np.stack([laws.frequencies(int(number)) for number in law]).astype(np.uint32))


def _lanes(symbols: int) -> int:
    """Few enough that what they cost, two bytes each, is a five-hundredth of a bit per symbol."""
    return min(max(symbols // 8192, 1), 32)


def _low_bit_count(rows: NDArray[np.int64], columns: NDArray[np.int64], low_bits: NDArray[np.int64]) -> int:
    """Low bits of all entries together."""
    if not low_bits.any():
        return 0
    in_row, in_column = np.bincount(rows, minlength=len(low_bits)), np.bincount(columns, minlength=len(low_bits))
    entries = np.convolve(in_row, in_column)[: len(low_bits)]
    return int(entries @ low_bits)


@njit(cache=True, nogil=True)
def _magnitudes(codes, rows, columns, classes):  # type: ignore[no-untyped-def]
    """Sum of magnitudes and number of entries of each class."""
    total, count = np.zeros(classes), np.zeros(classes, np.int64)
    for r in range(codes.shape[0]):
        for i in range(codes.shape[1]):
            total[rows[r] + columns[i]] += abs(codes[r, i])
            count[rows[r] + columns[i]] += 1
    return total, count


@njit(cache=True, nogil=True)
def _histograms(codes, rows, columns, low_bits):  # type: ignore[no-untyped-def]
    """How often each magnitude of the high part occurs in each class; the last column counts what must be escaped."""
    seen = np.zeros((len(low_bits), HALF + 2))
    for r in range(codes.shape[0]):
        for i in range(codes.shape[1]):
            shift = low_bits[rows[r] + columns[i]]
            high = abs((codes[r, i] + ((1 << shift) >> 1)) >> shift)
            seen[rows[r] + columns[i], min(high, HALF + 1)] += 1
    return seen


@njit(cache=True, nogil=True)
def _split(codes, rows, columns, low_bits, available, symbols, escaped, low):  # type: ignore[no-untyped-def]
    """Fill symbols, escaped high parts and the stream of low bits; gives the number of escapes."""
    count = place = 0
    for r in range(codes.shape[0]):
        for i in range(codes.shape[1]):
            kind = rows[r] + columns[i]
            shift = low_bits[kind]
            moved = np.int64(codes[r, i]) + ((1 << shift) >> 1)
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
