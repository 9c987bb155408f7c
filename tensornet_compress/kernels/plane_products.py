"""Products of floats with packed fields (small unsigned integers, ``coding/planes.py``), for attention over coded tokens.

On processors fields are unpacked in registers and used at once, for up to ``MOST_ROWS`` rows of floats; on GPUs
by kernels in Triton, once these agreed with the reference: a chunk unpacked and multiplied in PyTorch, as is done elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
import torch
from llvmlite.binding import get_host_cpu_features
from numba import carray, cfunc, njit
from torch import Tensor

from tensornet_compress.coding.planes import FIELDS, UNIT, WIDTHS, PlaneLayout, Planes
from tensornet_compress.kernels.loops import SIGNATURE, run_items
from tensornet_compress.kernels.proof import agrees, triton_module
from tensornet_compress.kernels.vectors import LANES, add_fields_times_factors, copy_bytes, fields_times_weights, pointer

MOST_ROWS = 12 if get_host_cpu_features().get("avx512f") else 6
"""Rows whose sums stay in registers; more rows go through the codes several times."""
PAIR = 2
"""Units whose planes are gathered side by side before they are used: whole lines of the cache."""
_BLOCK = 8
"""Units whose weights stay in the nearest cache while all planes are multiplied with them."""


def times_planes(factors: Tensor, layout: PlaneLayout, planes: Planes) -> Tensor:
    """factors fp32 (batch, rows, k) @ fields of the codes (batch, k, tokens) -> fp32 (batch, rows, tokens), chunk by chunk."""
    if not looped(factors):
        kernels = _on_gpu(factors)
        return (unpacked_scores if kernels is None else kernels.times_planes)(factors, layout, planes)
    out = factors.new_empty(*factors.shape[:2], sum(_tokens(chunk) for chunk in planes.chunks))
    for rows in _passes(factors.shape[1]):
        ordered, done = factors[:, rows].mT.contiguous(), 0
        for chunk in planes.chunks:
            whole = {width: part.contiguous() for width, part in chunk.items()}
            args = (*described(whole, layout), ordered.data_ptr(), out.data_ptr(), done, *out.shape[1:], rows.start)
            items, work = len(out) * -(-whole[4].shape[2] // PAIR), ordered.numel() * _tokens(chunk)
            run_items(_scores(ordered.shape[2]).address, 0, items, work, args)
            done += _tokens(chunk)
    return out


def planes_times(layout: PlaneLayout, planes: Planes, weights: Tensor) -> Tensor:
    """weights fp32 (batch, rows, tokens) @ fields of the codes, transposed, (batch, tokens, k) -> fp32 (batch, rows, k)."""
    total, done = weights.new_zeros(*weights.shape[:2], layout.count), 0
    if not looped(total):
        kernels = _on_gpu(weights)
        return (unpacked_sums if kernels is None else kernels.planes_times)(layout, planes, weights)
    weights = weights.contiguous()
    for chunk in planes.chunks:
        whole = {width: part.contiguous() for width, part in chunk.items()}
        for rows in _passes(weights.shape[1]):
            count = rows.stop - rows.start
            args = (*described(whole, layout), weights.data_ptr(), total.data_ptr(), done, *weights.shape[1:], rows.start)
            run_items(_sums(count).address, 0, len(total) * layout.count, count * layout.count * _tokens(chunk), args)
        done += _tokens(chunk)
    return total


def unpacked_scores(factors: Tensor, layout: PlaneLayout, planes: Planes) -> Tensor:
    """The reference of ``times_planes``, in the dtype of ``factors``."""
    return torch.cat([factors @ layout.unpack(chunk).to(factors.dtype) for chunk in planes.chunks], -1)


def unpacked_sums(layout: PlaneLayout, planes: Planes, weights: Tensor) -> Tensor:
    """The reference of ``planes_times``, in the dtype of ``weights``."""
    total, done = weights.new_zeros(*weights.shape[:2], layout.count), 0
    for chunk in planes.chunks:
        total += weights[:, :, done : done + _tokens(chunk)] @ layout.unpack(chunk).to(weights.dtype).mT
        done += _tokens(chunk)
    return total


def _on_gpu(floats: Tensor) -> Any:
    """The module of kernels for GPUs, where such floats are on one, it is installed, and it proved right there."""
    if not floats.is_cuda or floats.dtype != torch.float32 or not floats.numel() or torch.cuda.is_current_stream_capturing():
        # A proof waits for the device, which a graph cannot record.
        return None
    return proved(str(floats.device))


@cache
def proved(device: str) -> Any:
    """The module of kernels for GPUs, once both agreed with the reference on a device; None, with a warning, where not."""
    kernels: Any = triton_module("triton_planes")
    if kernels is None:
        return None
    # More of everything than fits one tile.
    bits, tokens = [*FIELDS] * 9, 10 * UNIT
    layout = PlaneLayout.of(torch.tensor(bits))
    codes = torch.stack([torch.arange(2 * tokens).view(2, -1) * (2 * n + 37) % (1 << b) for n, b in enumerate(bits)], -1)
    planes = Planes((layout.pack(codes[:, : 9 * UNIT]), layout.pack(codes[:, 9 * UNIT :]))).to(torch.device(device))
    layout = layout.to(torch.device(device))
    factors, weights = (torch.linspace(-1, 1, 34 * n, device=device).view(2, 17, n) for n in (layout.count, tokens))
    told = f"attention over coded tokens on {device} unpacks them first"
    both = agrees(
        lambda: kernels.times_planes(factors, layout, planes), lambda: unpacked_scores(factors.double(), layout, planes), told
    ) and agrees(
        lambda: kernels.planes_times(layout, planes, weights), lambda: unpacked_sums(layout, planes, weights.double()), told
    )
    return kernels if both else None


def looped(floats: Tensor) -> bool:
    """Whether loops take such numbers."""
    return floats.device.type == "cpu" and floats.dtype == torch.float32 and floats.numel() > 0


def _tokens(chunk: dict[int, Tensor]) -> int:
    return chunk[4].shape[2] * UNIT


def _passes(rows: int) -> Iterator[slice]:
    """Rows in equal parts, no part of more than fit."""
    parts = -(-rows // MOST_ROWS)
    return (slice(rows * part // parts, rows * (part + 1) // parts) for part in range(parts))


def described(chunk: dict[int, Tensor], layout: PlaneLayout) -> tuple[int, ...]:
    """Addresses and numbers of planes, by width, and how many units these have: 7 numbers."""
    return *(chunk[width].data_ptr() for width in WIDTHS), *(layout.rows[width] for width in WIDTHS), chunk[4].shape[2]


@njit(cache=True, nogil=True)
def gather(args, b, unit, count, to):  # type: ignore[no-untyped-def]
    """Units of all planes that ``described`` tells of, side by side at an address; room is left for ``PAIR`` of each."""
    units = args[6]
    for kind in range(3):
        size = 32 >> kind
        for r in range(args[3 + kind]):
            source, into = args[kind] + ((b * args[3 + kind] + r) * units + unit) * size, to
            for _ in range(count):
                if kind == 0:
                    copy_bytes(into, source, 32)
                elif kind == 1:
                    copy_bytes(into, source, 16)
                else:
                    copy_bytes(into, source, 8)
                source, into = source + size, into + size
            to += PAIR * size


@cache
def _scores(rows: int) -> Any:
    """The loop of ``times_planes`` for a number of rows; its items are pairs of units, of all of the batch."""

    @cfunc(SIGNATURE, cache=True)
    def scores(first, last, address):  # type: ignore[no-untyped-def]
        args = carray(pointer(address), (13,), np.int64)
        n4, n2, n1, units, done, start = args[3], args[4], args[5], args[6], args[9], args[12]
        total, tokens, pairs = n4 + n2 + n1, args[11], (units + PAIR - 1) // PAIR
        out = carray(pointer(args[8]), (last // pairs + 1, args[10], tokens), np.float32)
        near, sums = np.empty(32 * PAIR * total, np.uint8), np.empty((rows, LANES), np.float32)
        for item in range(first, last):
            b, unit = item // pairs, item % pairs * PAIR
            here = min(PAIR, units - unit)
            gather(args, b, unit, here, near.ctypes.data)
            begin2, begin1 = near.ctypes.data + 32 * PAIR * n4, near.ctypes.data + 32 * PAIR * n4 + 16 * PAIR * n2
            factors = args[7] + 4 * rows * b * total
            for u in range(here):
                plane4, plane2, plane1 = near.ctypes.data + 32 * u, begin2 + 16 * u, begin1 + 8 * u
                factors2, factors1, to = factors + 4 * rows * n4, factors + 4 * rows * (n4 + n2), sums.ctypes.data
                for quarter in range(4):
                    sums[:] = 0
                    add_fields_times_factors(4, rows, quarter, n4, plane4, 32 * PAIR, factors, to)
                    add_fields_times_factors(2, rows, quarter, n2, plane2, 16 * PAIR, factors2, to)
                    add_fields_times_factors(1, rows, quarter, n1, plane1, 8 * PAIR, factors1, to)
                    at = done + (unit + u) * UNIT + quarter * LANES
                    for k in range(rows):
                        out[b, start + k, at : at + LANES] = sums[k]

    return scores


@cache
def _sums(rows: int) -> Any:
    """The loop of ``planes_times`` for a number of rows; its items are planes, of all of the batch."""

    @cfunc(SIGNATURE, cache=True)
    def weighted(first, last, address):  # type: ignore[no-untyped-def]
        args = carray(pointer(address), (13,), np.int64)
        n4, n2, n1, units, done, start = args[3], args[4], args[5], args[6], args[9], args[12]
        total, all_rows, tokens = n4 + n2 + n1, args[10], args[11]
        out = carray(pointer(args[8]), (last // total + 1, all_rows, total), np.float32)
        found = np.empty(rows, np.float32)
        to, stride = found.ctypes.data, 4 * tokens
        for unit in range(0, units, _BLOCK):
            here = min(_BLOCK, units - unit)
            for item in range(first, last):
                b, r = item // total, item % total
                weights = args[7] + 4 * ((b * all_rows + start) * tokens + done + unit * UNIT)
                if r < n4:
                    plane = args[0] + ((b * n4 + r) * units + unit) * 32
                    fields_times_weights(4, rows, here, plane, weights, stride, to)
                elif r < n4 + n2:
                    plane = args[1] + ((b * n2 + r - n4) * units + unit) * 16
                    fields_times_weights(2, rows, here, plane, weights, stride, to)
                else:
                    plane = args[2] + ((b * n1 + r - n4 - n2) * units + unit) * 8
                    fields_times_weights(1, rows, here, plane, weights, stride, to)
                for k in range(rows):
                    out[b, start + k, r] += found[k]

    return weighted
