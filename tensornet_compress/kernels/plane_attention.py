"""Attention over packed fields (``coding/planes.py``) in one go: scores, exponentials and weighted sums of a few hundred tokens
after the other, so that no score leaves the caches of its core. For processors; ``plane_products.py`` has the parts.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from numba import carray, cfunc, njit
from torch import Tensor

from tensornet_compress.coding.planes import UNIT, PlaneLayout, Planes
from tensornet_compress.kernels.loops import SIGNATURE, run_items
from tensornet_compress.kernels.plane_products import MOST_ROWS, PAIR, described, gather, looped
from tensornet_compress.kernels.vectors import (
    LANES,
    add_fields_times_factors,
    exponentials,
    fields_times_weights,
    largest,
    pointer,
)

_SPLIT = 8
"""Units whose weights stay in the nearest cache; a thread takes some. Fixed: sums do not depend on threads."""
_MOST_QUERIES = 48
"""More rows at once than this are as quick one product after the other."""
_LEFT_OUT = -1e30


class CodedTokens(NamedTuple):
    """Keys or values (batch, heads, tokens, width): some in planes, a few of these exact as well, and exact ones behind them.

    Args:
        rows: fp32 (fields + 1, heads width), what each field stands for, and behind that what every coded token shares.
        sinks: fp32 (batch, heads, few, width), in place of coded tokens.
        tail: fp32 (batch, heads, recent, width).
    """

    layout: PlaneLayout
    planes: Planes
    rows: Tensor
    sinks: Tensor
    tail: Tensor


def attends(query: Tensor, keys: Planes, values: Planes) -> bool:
    """Whether ``attended`` takes such queries (batch, heads, queries, width) and planes."""
    same = [chunk[4].shape[2] for chunk in keys.chunks] == [chunk[4].shape[2] for chunk in values.chunks]
    return looped(query) and query.shape[1] * query.shape[2] <= _MOST_QUERIES and bool(keys.chunks) and same


def attended(query: Tensor, left_out: Tensor, keys: CodedTokens, values: CodedTokens) -> Tensor:
    """Softmax attention of scaled queries, fp32 (batch, heads, queries, width), over all tokens, in the same shape.

    ``left_out``: coded tokens in whose place sinks stand, int64 (batch, few).
    """
    batch, heads, queries, width = query.shape
    rows, units = heads * queries, [chunk[4].shape[2] for chunk in keys.planes.chunks]
    passes = -(-rows // MOST_ROWS)
    together = -(-rows // passes)
    padded, splits, fields = passes * together, sum(-(-count // _SPLIT) for count in units), values.layout.count + 1
    ordered, shared = query.new_empty(batch, passes, keys.layout.count, together), query.new_empty(batch, rows)
    tops, sums = query.new_empty(batch, padded, splits), query.new_empty(batch, padded, splits, fields)
    query, left_out, out = (
        query.contiguous(),
        left_out.contiguous(),
        torch.empty_like(query, memory_format=torch.contiguous_format),
    )
    sizes = (batch, heads, queries, width)
    _begin(
        query.data_ptr(),
        keys.rows.data_ptr(),
        sizes,
        keys.layout.count,
        together,
        passes,
        ordered.data_ptr(),
        shared.data_ptr(),
    )
    split = done = 0
    for count, of_keys, of_values in zip(units, keys.planes.chunks, values.planes.chunks):
        of_keys, of_values = ({width: part.contiguous() for width, part in chunk.items()} for chunk in (of_keys, of_values))
        args = (
            *described(of_keys, keys.layout), *described(of_values, values.layout)[:6], ordered.data_ptr(), left_out.data_ptr(),
            left_out.shape[1], done, splits, split, passes, tops.data_ptr(), sums.data_ptr(),
        )  # fmt: skip
        items = -(-count // _SPLIT)
        work = batch * padded * (keys.layout.count + fields) * count * UNIT
        run_items(_attention(together).address, 0, batch * items, work, args)
        split, done = split + items, done + count * UNIT
    exact = [part.contiguous() for part in (keys.sinks, keys.tail, values.sinks, values.tail)]
    addresses = (query.data_ptr(), shared.data_ptr(), tops.data_ptr(), sums.data_ptr(), values.rows.data_ptr(), out.data_ptr())
    held = tuple(part.data_ptr() for part in exact)
    _finish(addresses, held, sizes, padded, splits, fields, exact[0].shape[2], exact[1].shape[2])
    return out


_SUMS = {"reassoc", "contract", "nsz"}
"""What sums of products may be reordered for, so that they become vectors; numbers that are none stay so."""


@njit(cache=True, nogil=True, fastmath=_SUMS)
def _begin(query, key_rows, sizes, count, together, passes, ordered, shared):  # type: ignore[no-untyped-def]
    """What fields of keys are multiplied with, by passes; and what all coded tokens share of a score."""
    batch, heads, queries, width = sizes
    rows = heads * queries
    x, r = (
        carray(pointer(query), (batch, rows, width), np.float32),
        carray(pointer(key_rows), (count + 1, heads, width), np.float32),
    )
    factors = carray(pointer(ordered), (batch, passes, count, together), np.float32)
    constants = carray(pointer(shared), (batch, rows), np.float32)
    for b in range(batch):
        for row in range(passes * together):
            g, k, head = row // together, row % together, row // queries
            for f in range(count + 1):
                total = np.float32(0)
                if row < rows:
                    for w in range(width):
                        total += x[b, row, w] * r[f, head, w]
                if f < count:
                    factors[b, g, f, k] = total
                elif row < rows:
                    constants[b, row] = total


@njit(cache=True, nogil=True, fastmath=_SUMS)
def _finish(addresses, exact, sizes, padded, splits, fields, few, recent):  # type: ignore[no-untyped-def]
    """Join what all splits found with the exact tokens."""
    batch, heads, queries, width = sizes
    rows, tokens = heads * queries, few + recent
    x, shared = (
        carray(pointer(addresses[0]), (batch, rows, width), np.float32),
        carray(pointer(addresses[1]), (batch, rows), np.float32),
    )
    tops = carray(pointer(addresses[2]), (batch, padded, splits), np.float32)
    sums = carray(pointer(addresses[3]), (batch, padded, splits, fields), np.float32)
    value_rows = carray(pointer(addresses[4]), (fields, heads, width), np.float32)
    out = carray(pointer(addresses[5]), (batch, rows, width), np.float32)
    key_sinks, value_sinks = (
        carray(pointer(exact[0]), (batch, heads, few, width), np.float32),
        carray(pointer(exact[2]), (batch, heads, few, width), np.float32),
    )
    key_tail, value_tail = (
        carray(pointer(exact[1]), (batch, heads, recent, width), np.float32),
        carray(pointer(exact[3]), (batch, heads, recent, width), np.float32),
    )
    scores, coded, result = np.empty(tokens, np.float32), np.empty(fields, np.float32), np.empty(width, np.float32)
    for b in range(batch):
        for row in range(rows):
            head = row // queries
            top = tops[b, row, 0]
            for split in range(1, splits):
                top = max(top, tops[b, row, split])
            top += shared[b, row]
            for t in range(tokens):
                key = key_sinks[b, head, t] if t < few else key_tail[b, head, t - few]
                score = np.float32(0)
                for w in range(width):
                    score += x[b, row, w] * key[w]
                scores[t] = score
                # Not a number wins, as it does in the product.
                top = top if top > score else score
            coded[:] = 0
            for split in range(splits):
                share, part = np.exp(tops[b, row, split] + shared[b, row] - top), sums[b, row, split]
                for f in range(fields):
                    coded[f] += share * part[f]
            total, result[:] = coded[fields - 1], np.float32(0)
            for f in range(fields):
                for w in range(width):
                    result[w] += coded[f] * value_rows[f, head, w]
            for t in range(tokens):
                value = value_sinks[b, head, t] if t < few else value_tail[b, head, t - few]
                share = np.exp(scores[t] - top)
                total += share
                for w in range(width):
                    result[w] += share * value[w]
            for w in range(width):
                out[b, row, w] = result[w] / total


@cache
def _attention(rows: int) -> Any:
    """The loop of ``attended`` for a number of rows at a time; its items are splits, of all of the batch."""

    @cfunc(SIGNATURE, cache=True)
    def attention(first, last, address):  # type: ignore[no-untyped-def]
        args = carray(pointer(address), (22,), np.int64)
        n4, n2, n1, units, v4, v2, v1 = args[3], args[4], args[5], args[6], args[10], args[11], args[12]
        few, done, splits, before, passes = args[15], args[16], args[17], args[18], args[19]
        total, fields, all_rows, items = n4 + n2 + n1, v4 + v2 + v1, passes * rows, (units + _SPLIT - 1) // _SPLIT
        batch = (last - 1) // items + 1
        left_out = carray(pointer(args[14]), (batch, few), np.int64)
        tops = carray(pointer(args[20]), (batch, all_rows, splits), np.float32)
        out = carray(pointer(args[21]), (batch, all_rows, splits, fields + 1), np.float32)
        near, sums = np.empty(32 * PAIR * total, np.uint8), np.empty((rows, LANES), np.float32)
        weights, found = np.empty((all_rows, _SPLIT * UNIT), np.float32), np.empty(rows, np.float32)
        to, stride, get = sums.ctypes.data, 4 * _SPLIT * UNIT, found.ctypes.data
        begin2, begin1 = near.ctypes.data + 32 * PAIR * n4, near.ctypes.data + 32 * PAIR * n4 + 16 * PAIR * n2
        for item in range(first, last):
            b, start = item // items, item % items * _SPLIT
            here, at_split = min(_SPLIT, units - start), before + item % items
            for unit in range(start, start + here, PAIR):
                together = min(PAIR, start + here - unit)
                gather(args, b, unit, together, near.ctypes.data)
                for g in range(passes):
                    factors = args[13] + 4 * rows * (b * passes + g) * total
                    factors2, factors1 = factors + 4 * rows * n4, factors + 4 * rows * (n4 + n2)
                    for u in range(together):
                        plane4, plane2, plane1 = near.ctypes.data + 32 * u, begin2 + 16 * u, begin1 + 8 * u
                        for quarter in range(4):
                            sums[:] = 0
                            add_fields_times_factors(4, rows, quarter, n4, plane4, 32 * PAIR, factors, to)
                            add_fields_times_factors(2, rows, quarter, n2, plane2, 16 * PAIR, factors2, to)
                            add_fields_times_factors(1, rows, quarter, n1, plane1, 8 * PAIR, factors1, to)
                            at = (unit - start + u) * UNIT + quarter * LANES
                            for k in range(rows):
                                for lane in range(LANES):
                                    weights[g * rows + k, at + lane] = sums[k, lane]
            for row in range(all_rows):
                for n in range(few):
                    at = left_out[b, n] - done - start * UNIT
                    if 0 <= at < here * UNIT:
                        weights[row, at] = _LEFT_OUT
                address_of_row = weights.ctypes.data + row * stride
                top = largest(address_of_row, here * (UNIT // LANES))
                tops[b, row, at_split] = top
                out[b, row, at_split, fields] = exponentials(address_of_row, here * (UNIT // LANES), top)
            for g in range(passes):
                weighed = weights.ctypes.data + g * rows * stride
                for r in range(fields):
                    if r < v4:
                        plane = args[7] + ((b * v4 + r) * units + start) * 32
                        fields_times_weights(4, rows, here, plane, weighed, stride, get)
                    elif r < v4 + v2:
                        plane = args[8] + ((b * v2 + r - v4) * units + start) * 16
                        fields_times_weights(2, rows, here, plane, weighed, stride, get)
                    else:
                        plane = args[9] + ((b * v1 + r - v4 - v2) * units + start) * 8
                        fields_times_weights(1, rows, here, plane, weighed, stride, get)
                    for k in range(rows):
                        out[b, g * rows + k, at_split, r] = found[k]

    return attention
