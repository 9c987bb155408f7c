"""Orders of entries with ties as entropy-coded bytes: of every entry of a run, to which group of the sorted run it belongs.

All runs share the sizes of their groups. An entry is coded by what is left of each group in its run, so that an order takes
what it tells and no more: ``log2(run! / (size_1! ... size_K!))`` bits a run. The coder is an rANS with one state in
[2^32, 2^64), renormalised by 32-bit words, and frequencies that sum to 2^16 (docs/file-format.md has the arithmetic).
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, lgamma, log, log2

import numpy as np
from numba import njit
from numpy.typing import NDArray

from tensornet_compress.errors import CheckpointError

MOST_GROUPS = 256
_PRECISION = 16
_LEAST = np.uint64(1 << 32)
_HEADER = 8


def most_order_nbytes(runs: int, sizes: Sequence[int]) -> int:
    """Bytes that ``encode_orders`` stays within: what the orders tell, and up to ``K / 2^16`` of a nat for each entry."""
    told = (lgamma(sum(sizes) + 1) - sum(lgamma(size + 1) for size in sizes)) / log(2)
    shared = -sum(sizes) * log2(1 - len(sizes) / (1 << _PRECISION))
    return 4 * len(sizes) + _HEADER + 8 + ceil(1.0001 * runs * (told + shared) / 8)


def encode_orders(groups: NDArray[np.uint8], sizes: Sequence[int]) -> NDArray[np.uint8]:
    """Group of every entry, uint8 (runs, run), each run with ``sizes[k]`` entries of group k -> bytes."""
    words = np.empty(groups.size + 1, np.uint32)
    state, first = _LEAST, len(words)
    if len(sizes) > 1:
        state, first = _encode(np.ascontiguousarray(groups), np.array(sizes, np.int64), words)
    header = [np.array(sizes, "<u4").view(np.uint8), np.array([state], "<u8").view(np.uint8)]
    return np.concatenate([*header, words[first:].astype("<u4").view(np.uint8)])


def decode_orders(data: NDArray[np.uint8], runs: int, run: int, groups: int) -> NDArray[np.uint8]:
    """The inverse of ``encode_orders``.

    Raises:
        CheckpointError: the bytes are damaged.
    """
    if len(data) < 4 * groups + _HEADER or len(data) % 4:
        raise CheckpointError(f"an order of {groups} groups cannot have {len(data)} bytes; the file is damaged")
    sizes = data[: 4 * groups].copy().view("<u4").astype(np.int64)
    if int(sizes.sum()) != run or not sizes.all():
        raise CheckpointError(f"groups of {sizes.tolist()} entries are no run of {run}; the file is damaged")
    state = int(data[4 * groups : 4 * groups + _HEADER].copy().view("<u8")[0])
    words = data[4 * groups + _HEADER :].copy().view("<u4").astype(np.uint32)
    found = np.zeros((runs, run), np.uint8)
    used, ended = (0, state) if groups == 1 else _decode(words, np.uint64(state), sizes, found)
    if used != len(words) or ended != _LEAST:
        raise CheckpointError(f"an order of {found.size} entries does not end where it should; the file is damaged")
    return found


@njit(cache=True, nogil=True)
def _encode(groups, sizes, words):  # type: ignore[no-untyped-def]
    """Fill ``words`` from its end; gives the state and the index of the first one. Runs backwards, so that decoding runs
    forwards."""
    runs, run = groups.shape
    scale = (1 << _PRECISION) - len(sizes)
    start, width = np.empty(run, np.uint64), np.empty(run, np.uint64)
    state, first = _LEAST, len(words)
    for r in range(runs - 1, -1, -1):
        left = sizes.copy()
        for i in range(run):
            group = groups[r, i]
            below = left[:group].sum()
            start[i] = group + below * scale // (run - i)
            width[i] = group + 1 + (below + left[group]) * scale // (run - i) - np.int64(start[i])
            left[group] -= 1
        for i in range(run - 1, -1, -1):
            if state >= width[i] << np.uint64(64 - _PRECISION):
                first -= 1
                words[first] = np.uint32(state & np.uint64(0xFFFFFFFF))
                state >>= np.uint64(32)
            quotient = state // width[i]
            state = (quotient << np.uint64(_PRECISION)) + (state - quotient * width[i]) + start[i]
    return state, first


@njit(cache=True, nogil=True)
def _decode(words, state, sizes, groups):  # type: ignore[no-untyped-def]
    """Fill ``groups``; gives the number of words that were read and the last state, -1 words where the input is damaged."""
    runs, run = groups.shape
    scale = (1 << _PRECISION) - len(sizes)
    position = 0
    for r in range(runs):
        left = sizes.copy()
        for i in range(run):
            slot, total = np.int64(state & np.uint64((1 << _PRECISION) - 1)), run - i
            group = below = 0
            # Group k + 1 starts at k + 1 + floor(x / total): compared without a division.
            while (below + left[group]) * scale < (slot - group) * total:
                below += left[group]
                group += 1
            if left[group] == 0:
                return -1, state
            start = group + below * scale // total
            width = group + 1 + (below + left[group]) * scale // total - start
            state = np.uint64(width) * (state >> np.uint64(_PRECISION)) + np.uint64(slot - start)
            if state < _LEAST:
                if position == len(words):
                    return -1, state
                state = (state << np.uint64(32)) | np.uint64(words[position])
                position += 1
            groups[r, i] = group
            left[group] -= 1
    return position, state
