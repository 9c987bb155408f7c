"""Two quantisers of twice the step that take turns: a trellis of eight states (trellis-coded or dependent quantisation).

In even states a level k stands for the integer 2 k, in odd ones for 2 k - sign(k); the parity of k leads to the next state. A
sequence so has the choice among twice as many integers as its levels tell: at equal bits the mean square error is about a
fifth below that of integers coded one by one (Marcellin and Fischer, 1990; the table is that of video coding). Sequences run
down the columns of a matrix, each from state 0.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numba import njit
from numpy.typing import NDArray

from tensornet_compress.errors import CodeError

STATES: Final = 8
NEXT = np.array([[0, 2], [5, 7], [1, 3], [6, 4], [2, 0], [4, 6], [3, 1], [7, 5]], np.int64)
"""State after a level of even or odd parity."""
GRID = 0.5643
"""Distance of neighbouring integers over the step that plain integers of the same error have, at high rates."""


def levels(codes: NDArray[np.int32]) -> tuple[NDArray[np.int32], NDArray[np.uint8]]:
    """Integers (rows, columns) of a trellis -> levels int32, and of which quantiser each is, uint8.

    Raises:
        CodeError: a column is no path of the trellis.
    """
    level, side = np.empty(codes.shape, np.int32), np.empty(codes.shape, np.uint8)
    if not _levels(np.ascontiguousarray(codes, np.int32), NEXT, level, side):
        raise CodeError(f"integers of shape {codes.shape} are no paths of the trellis; take those that best_path gives")
    return level, side


@njit(cache=True, nogil=True)
def _levels(codes, table, level, side):  # type: ignore[no-untyped-def]
    states = np.zeros(codes.shape[1], np.int64)
    for r in range(codes.shape[0]):
        for i in range(codes.shape[1]):
            odd = states[i] & 1
            code = codes[r, i]
            found = (abs(code) + odd) >> 1
            level[r, i] = found if code >= 0 else -found
            side[r, i] = odd
            if 2 * found - (odd if found else 0) != abs(code):
                return False
            states[i] = table[states[i], found & 1]
    return True


@njit(cache=True, nogil=True, fastmath=True)
def best_path(values, kinds, bits, table, codes):  # type: ignore[no-untyped-def]
    """Fill ``codes`` (rows,) for ``values`` (rows,) in units of the grid: least squared error + ``bits`` (2, kinds, levels),
    which are in the same units."""
    rows, most = len(values), bits.shape[2] - 1
    cost, new = np.full(8, 1e30), np.empty(8)
    cost[0] = 0.0
    came = np.empty((rows, 8), np.uint8)
    taken = np.empty((rows, 4), np.int32)
    price = np.empty(4)
    # The two ways into each state: from where, and by which quantiser and parity.
    source, way = np.empty((8, 2), np.int64), np.empty((8, 2), np.int64)
    ways = np.zeros(8, np.int64)
    for state in range(8):
        for parity in range(2):
            to = table[state, parity]
            source[to, ways[to]] = state
            way[to, ways[to]] = 2 * (state & 1) + parity
            ways[to] += 1
    for r in range(rows):
        size, kind = abs(values[r]), kinds[r]
        for odd in range(2):
            near = int((size + odd) * 0.5)
            price[2 * odd], price[2 * odd + 1] = 1e30, 1e30
            for level in range(max(near - 1, 0), near + 2):
                place = 2 * odd + (level & 1)
                found = 2 * level - odd if level else 0
                paid = (size - found) ** 2 + bits[odd, kind, min(level, most)]
                if paid < price[place]:
                    price[place], taken[r, place] = paid, found
            if 1 < near < 4:
                paid = size * size + bits[odd, kind, 0]
                if paid < price[2 * odd]:
                    price[2 * odd], taken[r, 2 * odd] = paid, 0
        for state in range(8):
            first = cost[source[state, 0]] + price[way[state, 0]]
            second = cost[source[state, 1]] + price[way[state, 1]]
            new[state] = min(first, second)
            came[r, state] = second < first
        cost[:] = new - new.min()
    state = int(np.argmin(cost))
    for r in range(rows - 1, -1, -1):
        one = came[r, state]
        found = taken[r, way[state, one]]
        codes[r] = found if values[r] >= 0 else -found
        state = source[state, one]


@njit(cache=True, nogil=True)
def decode(words, available, lane_state, rows, columns, slots, classes, table, low_bits, escaped, low, codes):  # type: ignore[no-untyped-def]
    """Fill ``codes`` from the words of ``coding/rans.py``, with escapes and low bits as in ``coding/coded_integers.py``; gives
    the number of words and of escapes that were read (of damaged input perhaps more than there are)."""
    states = np.zeros(codes.shape[1], np.int64)
    position = count = place = lane = 0
    for r in range(codes.shape[0]):
        for i in range(codes.shape[1]):
            if position > available:
                return position, count
            state = states[i]
            odd = state & 1
            kind = rows[r] + columns[i] + classes * odd
            value = lane_state[lane]
            entry = slots[(kind << 12) + np.int64(value & np.uint32(4095))]
            value = ((entry >> np.uint32(20)) + np.uint32(1)) * (value >> np.uint32(12)) + (
                (entry >> np.uint32(8)) & np.uint32(4095)
            )
            if value < np.uint32(65536):
                value = (value << np.uint32(16)) | np.uint32(words[position])
                position += 1
            lane_state[lane] = value
            lane = lane + 1 if lane + 1 < len(lane_state) else 0
            level = np.int64(entry & np.uint32(255)) - 31
            if level == 32:
                if count >= len(escaped):
                    return position, count + 1
                level = np.int64(escaped[count])
                count += 1
            shift = low_bits[kind]
            if shift:
                rest = np.int64(0)
                for bit in range(shift):
                    rest |= np.int64((low[place >> 3] >> (place & 7)) & 1) << bit
                    place += 1
                level = (level << shift) + rest - ((1 << shift) >> 1)
            size = 2 * abs(level)
            if odd and size:
                size -= 1
            codes[r, i] = size if level >= 0 else -size
            states[i] = table[state, level & 1]
    return position, count
