"""Compiled loops over the rows of a coded matrix on processors: products with a few inputs, and decoding.

One pair of loops is compiled for each kind of codes, as C functions (rows from, rows to, address of the other arguments), so
that what spreads rows over threads is compiled once for all. numba keeps them on disk.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from numba import carray, cfunc, njit, prange, types
from torch import Tensor

from tensornet_compress.coding.codes import Codes
from tensornet_compress.kernels.vectors import (
    LANES,
    SIGNED,
    block_products,
    call,
    float_at,
    lane_codes,
    pointer,
    step,
    unshifts,
)
from tensornet_compress.threads import compiled_threads, worthwhile_threads

_FLOATS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_LEAST_PER_THREAD = 1 << 17
"""Numbers to decode that are worth another thread."""
_LEAST_PRODUCTS = 1 << 18
"""Products that are: about 20 microseconds of work, what it takes another thread to notice that it is wanted."""
SIGNATURE = types.void(types.int64, types.int64, types.int64)
_TILE = 32
"""Rows of codes that all inputs are multiplied with before the next."""
_UNSHIFTS = np.array([(*unshifts(bits), *[0] * 16)[:16] for bits in range(9)], np.float32)
_NO_ZERO, _PACKED_ZERO, _FLOAT_ZERO = 0, 1, 2


class Loops(NamedTuple):
    """The loops of one matrix. ``kind``: see ``_products``; ``matrix``: addresses and sizes, see ``_decoder``."""

    kind: tuple[int, int, int, int]
    matrix: tuple[int, ...]
    initial: float
    weights: int

    def multiply(self, x: Tensor, count: int, y: Tensor) -> None:
        """y (..., m) = x (..., width) W' for ``count`` inputs, both fp32 and contiguous."""
        args = (_products(*self.kind).address, x.data_ptr(), count, y.data_ptr(), self.kind[0], self.initial, self.matrix)
        threads = worthwhile_threads(self.weights * count, _LEAST_PRODUCTS)
        if threads == 1:
            _multiply(*args)
        else:
            with compiled_threads(threads):
                _multiply_on_threads(threads, *args)

    def decode(self, first: int, last: int, out: Tensor) -> None:
        """Rows ``first`` to ``last`` into the first rows of out (k, width), fp32 and contiguous."""
        arguments = (*self.matrix, first, out.data_ptr())
        run_items(_decoder(*self.kind).address, first, last, (last - first) * self.matrix[2], arguments)


def run_items(function: int, first: int, last: int, work: int, arguments: tuple[int, ...]) -> None:
    """Call a loop (address of a C function) on items ``first`` to ``last``, on as many threads as the work is worth."""
    threads = worthwhile_threads(work, _LEAST_PER_THREAD)
    if threads == 1:
        _run(function, first, last, arguments)
    else:
        with compiled_threads(threads):
            _run_on_threads(threads, function, first, last, arguments)


def loops_for(codes: Codes) -> Loops | None:
    """``None`` where there are none for such codes: rows that do not start on bytes, groups whose borders lie inside a lane."""
    scale, zero, bits = codes.scale, codes.zero, SIGNED if codes.signed else codes.bits
    groups = scale.shape[1]
    parts, kind = _parts(bits, codes.group) if groups > 1 else 0, _FLOATS.get(scale.dtype)
    if kind is None or parts is None or codes.width * codes.bits % 8 or codes.codes.device.type != "cpu":
        return None
    plain = codes.codes.is_contiguous() and scale.is_contiguous()
    if codes.place is not None:
        plain = plain and codes.place.dtype == torch.int32 and scale.dtype == torch.float32
    if not plain or (zero is not None and zero.dtype not in (torch.uint8, scale.dtype)):
        return None
    zeros = _NO_ZERO if zero is None else _PACKED_ZERO if zero.dtype == torch.uint8 else _FLOAT_ZERO
    beyond = 0 if codes.place is None else codes.place.numel()
    matrix = (
        codes.codes.data_ptr(), len(scale), codes.width, codes.group, groups, scale.data_ptr(), _address(zero),
        _address(codes.column), _address(codes.place), _address(codes.excess), beyond,
    )  # fmt: skip
    # What a lane's sum begins with, times its inputs: less the middle of unsigned codes; plainly their sum where zeros follow.
    initial = 0.0 if bits == SIGNED or (zeros and not parts) else 1.0 if zeros else -float(1 << (bits - 1))
    return Loops((bits, parts, zeros, kind), matrix, initial, len(scale) * codes.width)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _parts(bits: int, group: int) -> int | None:
    """Groups in a block (1: no block has two), ``None`` where their borders do not fit."""
    columns = step(bits)
    if group % columns == 0:
        return 1
    return columns // group if columns % group == 0 and group % lane_codes(bits) == 0 and bits != SIGNED else None


@njit(cache=True, nogil=True)
def _prepared(x, count, width, column, bits, initial):  # type: ignore[no-untyped-def]
    """Inputs times column factors, and the same in the order of ``vectors.py``, with ``initial`` times each lane's sum."""
    per = 4 if bits == SIGNED else 32 // bits if bits == 2 or bits == 4 or bits == 8 else 8
    columns = LANES * per
    blocks = (width + columns - 1) // columns
    scaled = np.zeros((count, blocks * columns), np.float32)
    ordered = np.empty((count, blocks, per + 1, LANES), np.float32)
    given, factors = carray(pointer(x), (count, width), np.float32), carray(pointer(column), (width,), np.float32)
    for k in range(count):
        if column:
            for i in range(width):
                scaled[k, i] = given[k, i] * factors[i]
        else:
            for i in range(width):
                scaled[k, i] = given[k, i]
        for b in range(blocks):
            block, into = scaled[k, b * columns : (b + 1) * columns], ordered[k, b]
            into[per] = 0
            for j in range(per):
                part = block[LANES * j : LANES * (j + 1)] if bits == SIGNED else block[j::per]
                unshift = np.float32(1) if bits == SIGNED else _UNSHIFTS[bits, j]
                for lane in range(LANES):
                    into[j, lane] = unshift * part[lane]
                    into[per, lane] += initial * part[lane]
    return scaled, ordered


@njit(cache=True, nogil=True)
def _multiply(function, x, count, out, bits, initial, matrix):  # type: ignore[no-untyped-def]
    scaled, ordered = _prepared(x, count, matrix[2], matrix[7], bits, initial)
    args = np.array((*matrix, count, scaled.ctypes.data, ordered.ctypes.data, ordered.shape[1], out), np.int64)
    call(function, 0, matrix[1], args.ctypes.data)
    # Arrays whose addresses are in use must live until here.
    return scaled[0, 0] + ordered[0, 0, 0, 0] + args[0]


@njit(cache=True, nogil=True, parallel=True)
def _multiply_on_threads(threads, function, x, count, out, bits, initial, matrix):  # type: ignore[no-untyped-def]
    scaled, ordered = _prepared(x, count, matrix[2], matrix[7], bits, initial)
    args = np.array((*matrix, count, scaled.ctypes.data, ordered.ctypes.data, ordered.shape[1], out), np.int64)
    for t in prange(threads):
        call(function, t * matrix[1] // threads, (t + 1) * matrix[1] // threads, args.ctypes.data)
    return scaled[0, 0] + ordered[0, 0, 0, 0] + args[0]


@njit(cache=True, nogil=True)
def _run(function, first, last, arguments):  # type: ignore[no-untyped-def]
    args = np.array(arguments, np.int64)
    call(function, first, last, args.ctypes.data)
    return args[0]


@njit(cache=True, nogil=True, parallel=True)
def _run_on_threads(threads, function, first, last, arguments):  # type: ignore[no-untyped-def]
    args = np.array(arguments, np.int64)
    for t in prange(threads):
        call(function, first + t * (last - first) // threads, first + (t + 1) * (last - first) // threads, args.ctypes.data)
    return args[0]


@njit(cache=True, nogil=True)
def _packed_at(packed, bits, number):  # type: ignore[no-untyped-def]
    """A packed integer, as fp32."""
    start = number * bits
    word = np.int32(packed[start >> 3]) | np.int32(packed[(start + bits - 1) >> 3]) << 8
    return np.float32(word >> (start & 7) & ((1 << bits) - 1))


@njit(cache=True, nogil=True)
def _scale_and_zero(number, total, scale, zero, kind, zeros, bits):  # type: ignore[no-untyped-def]
    """Of a group: what codes are multiplied with, and what is added to them then."""
    if kind == 0:
        found = float_at(0, scale + 4 * number)
    elif kind == 1:
        found = float_at(1, scale + 2 * number)
    else:
        found = float_at(2, scale + 2 * number)
    if zeros == _PACKED_ZERO:
        return found, -found * _packed_at(carray(pointer(zero), ((total * bits + 7) // 8,), np.uint8), bits, number)
    if zeros == _NO_ZERO:
        return found, np.float32(0) if bits == SIGNED else -found * np.float32(1 << (bits - 1))
    if kind == 0:
        return found, float_at(0, zero + 4 * number)
    if kind == 1:
        return found, float_at(1, zero + 2 * number)
    return found, float_at(2, zero + 2 * number)


@cache
def _products(bits: int, parts: int, zeros: int, kind: int) -> Any:
    """The loop that multiplies rows of such codes with a few inputs.

    Args:
        bits: of a code, or ``SIGNED``; parts: groups in a block, 0 where a row is one group.
        zeros: none, packed or floats; kind: of scales, see ``float_at``.
    """
    offset, pieces, columns, code_bits = int(parts and zeros), max(parts, 1), step(bits), abs(bits)
    size = 4 if kind == 0 else 2

    @cfunc(SIGNATURE, cache=True)
    def products(first, last, address):  # type: ignore[no-untyped-def]
        args = carray(pointer(address), (16,), np.int64)
        codes, m, width, group, groups, scale, zero = args[0], args[1], args[2], args[3], args[4], args[5], args[6]
        beyond, count, blocks = args[10], args[11], args[14]
        places, more = carray(pointer(args[8]), (beyond,), np.int32), carray(pointer(args[9]), (beyond,), np.int32)
        scaled = carray(pointer(args[12]), (count, blocks * columns), np.float32)
        result = carray(pointer(args[15]), (count, m), np.float32)
        row_bytes, read = width * code_bits // 8, blocks * columns * code_bits // 8 + 4
        whole, last_row = carray(pointer(codes), (m * row_bytes,), np.uint8), np.zeros(read, np.uint8)
        sums, scales, offsets = (
            np.empty(8, np.float32),
            np.empty(blocks * pieces, np.float32),
            np.empty(blocks * pieces, np.float32),
        )
        to, by, plus, stride = (
            sums.ctypes.data,
            scales.ctypes.data,
            offsets.ctypes.data,
            4 * LANES * blocks * (columns // LANES + 1),
        )
        scales_of, shifts = np.empty(_TILE * groups, np.float32), np.empty(_TILE * groups, np.float32)
        packed_zeros = carray(pointer(zero), ((m * groups * code_bits + 7) // 8,), np.uint8)
        # The group of each piece of a block; pieces behind the end of a row belong to its last one.
        owner = np.minimum(np.arange(blocks * pieces) * (columns // pieces) // group, groups - 1)
        for top in range(first, last, _TILE):
            bottom = min(top + _TILE, last)
            if parts:
                start, ahead = top * groups, (bottom - top) * groups
                for g in range(ahead):
                    scales_of[g] = float_at(kind, scale + size * (start + g))
                if zeros == _FLOAT_ZERO:
                    for g in range(ahead):
                        shifts[g] = float_at(kind, zero + size * (start + g))
                if zeros == _PACKED_ZERO:
                    for g in range(ahead):
                        shifts[g] = -scales_of[g] * _packed_at(packed_zeros, code_bits, start + g)
            k = 0
            while k < count:
                # A pass of inputs over a tile of rows: both stay in the nearest caches.
                x, left = args[13] + k * stride, count - k
                taken = 8 if left >= 8 else 4 if left >= 4 else 2 if left >= 2 else 1
                for r in range(top, bottom):
                    row, here = codes + r * row_bytes, (r - top) * groups
                    if r * row_bytes + read > len(whole):
                        # A block reaches beyond the end of its row, and behind the last rows there is nothing to read.
                        last_row[:row_bytes] = whole[r * row_bytes : (r + 1) * row_bytes]
                        row = last_row.ctypes.data
                    row_scale, row_zero = np.float32(1), np.float32(0)
                    if parts:
                        for piece in range(blocks * pieces):
                            scales[piece] = scales_of[here + owner[piece]]
                        if zeros:
                            for piece in range(blocks * pieces):
                                offsets[piece] = shifts[here + owner[piece]]
                    else:
                        row_scale, row_zero = _scale_and_zero(r, m, scale, zero, kind, zeros, bits)
                    if taken == 8:
                        block_products(bits, parts, offset, 8, row, x, stride, blocks, by, plus, to)
                    elif taken == 4:
                        block_products(bits, parts, offset, 4, row, x, stride, blocks, by, plus, to)
                    elif taken == 2:
                        block_products(bits, parts, offset, 2, row, x, stride, blocks, by, plus, to)
                    else:
                        block_products(bits, parts, offset, 1, row, x, stride, blocks, by, plus, to)
                    for j in range(k, k + taken):
                        result[j, r] = sums[j - k] * row_scale
                        if zeros and not parts:
                            result[j, r] += row_zero * scaled[j].sum()
                k += taken
        # Codes that do not fit. By themselves: a few in every row would cost more in mispredicted jumps than in sums.
        begin, end, rows_each = np.searchsorted(places, first * width), np.searchsorted(places, last * width), 1.0 / width
        factors = carray(pointer(scale), (m,), np.float32)
        for j in range(count):
            inputs, sums_of = scaled[j], result[j]
            for e in range(begin, end):
                place = np.int32(places[e])
                owner_row = np.int32((place + 0.5) * rows_each)
                column = place - owner_row * np.int32(width)
                sums_of[owner_row] += factors[owner_row] * np.float32(more[e]) * inputs[column]

    return products


@cache
def _decoder(bits: int, parts: int, zeros: int, kind: int) -> Any:
    """The loop that decodes rows; arguments as those of ``_products``."""
    code_bits = abs(bits)

    @cfunc(SIGNATURE, cache=True)
    def decode(first, last, address):  # type: ignore[no-untyped-def]
        args = carray(pointer(address), (13,), np.int64)
        codes, m, width, group, groups, scale, zero = args[0], args[1], args[2], args[3], args[4], args[5], args[6]
        column, beyond, start = args[7], args[10], args[11]
        places, more = carray(pointer(args[8]), (beyond,), np.int32), carray(pointer(args[9]), (beyond,), np.int32)
        row_bytes = width * code_bits // 8
        signed, packed = carray(pointer(codes), (m, width), np.int8), carray(pointer(codes), (m * row_bytes,), np.uint8)
        dense = carray(pointer(args[12]), (last - start, width), np.float32)
        factors = carray(pointer(column), (width,), np.float32)
        e = np.searchsorted(places, first * width)
        for r in range(first, last):
            row = dense[r - start]
            if bits == SIGNED:
                for i in range(width):
                    row[i] = signed[r, i]
            elif bits == 4:
                for j in range(row_bytes):
                    byte = packed[r * row_bytes + j]
                    row[2 * j], row[2 * j + 1] = byte & 15, byte >> 4
            else:
                for i in range(width):
                    row[i] = _packed_at(packed, code_bits, r * width + i)
            while e < beyond and places[e] < (r + 1) * width:
                row[places[e] - r * width] += more[e]
                e += 1
            for g in range(groups):
                factor, plus = _scale_and_zero(r * groups + g, m * groups, scale, zero, kind, zeros, bits)
                for i in range(g * group, min((g + 1) * group, width)):
                    row[i] = row[i] * factor + plus
            if column:
                for i in range(width):
                    row[i] *= factors[i]

    return decode
