"""Two quantisers of twice the step that take turns: a trellis of eight states (trellis-coded or dependent quantisation).

In even states a level k stands for the integer 2 k, in odd ones for 2 k - sign(k); the parity of k leads to the next state. A
sequence so has the choice among twice as many integers as its levels tell: at equal bits the mean square error is about a
fifth below that of integers coded one by one (Marcellin and Fischer, 1990; the table is that of video coding). Sequences run
down the columns of a matrix, each from state 0.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numba import njit
from numpy.typing import NDArray

from tensornet_compress.errors import CodeError

STATES: Final = 8
NEXT = np.array([[0, 2], [5, 7], [1, 3], [6, 4], [2, 0], [4, 6], [3, 1], [7, 5]], np.int64)
"""State after a level of even or odd parity."""
GRID = 0.5643
"""Distance of neighbouring integers over the step that plain integers of the same error have, at high rates."""
_WAYS = [
    [(state, parity) for state in range(STATES) for parity in range(2) if NEXT[state, parity] == to] for to in range(STATES)
]
_SOURCE = np.array([[state for state, _ in ways] for ways in _WAYS])
"""The two states before each, and ..."""
_WAY = np.array([[2 * (state & 1) + parity for state, parity in ways] for ways in _WAYS])
"""... 2 x quantiser + parity of the level that leads from there."""


def levels(codes: NDArray[np.int32], overwrite: bool = False) -> tuple[NDArray[np.int32], NDArray[np.uint8]]:
    """Integers (rows, columns) of a trellis -> levels int32, and of which quantiser each is, uint8. ``overwrite``: in the place
    of the integers.

    Raises:
        CodeError: a column is no path of the trellis.
    """
    codes = np.ascontiguousarray(codes, np.int32)
    level, side = codes if overwrite else np.empty(codes.shape, np.int32), np.empty(codes.shape, np.uint8)
    if not _levels(codes, NEXT, level, side):
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


@njit(cache=True, nogil=True)
def _prices(values, kinds, bits, odd, price, taken):  # type: ignore[no-untyped-def]
    """Of one quantiser, for each value the least price of a level of even and of odd parity, (2, rows), and the magnitudes that
    have it. The nearest level has one parity, its neighbours the other, and zero may be worth its few bits from further off.
    Without a branch, so that several values are looked at together."""
    most = bits.shape[1] - 1
    for r in range(len(values)):
        size, kind = abs(values[r]), kinds[r]
        # Whatever is given, no place beyond the table is read.
        near: Any = max(np.int32(min((size + odd) * 0.5, 1e9)), 0)
        below: Any = max(near - 1, 0)
        found = 2 * near - (odd if near > 0 else 0)
        lower = 2 * below - (odd if below > 0 else 0)
        upper = 2 * near + 2 - odd
        same = (size - found) ** 2 + bits[kind, min(near, most)]
        other = (size - upper) ** 2 + bits[kind, min(near + 1, most)]
        down = (size - lower) ** 2 + bits[kind, min(below, most)] if near > 0 else 1e30
        zero = size * size + bits[kind, 0] if (near == 2) | (near == 3) else 1e30
        upper = lower if down <= other else upper
        other = down if down <= other else other
        swapped = (near & 1) == 1
        even, at = (other, upper) if swapped else (same, found)
        price[0, r] = zero if zero < even else even
        taken[0, r] = 0 if zero < even else at
        price[1, r] = same if swapped else other
        taken[1, r] = found if swapped else upper


@njit(cache=True, nogil=True)
def best_path(values, kinds, bits, codes):  # type: ignore[no-untyped-def]
    """Fill ``codes`` (rows,) for ``values`` (rows,) in units of the grid: least squared error + ``bits`` (2, kinds, levels),
    which are in the same units."""
    rows = len(values)
    price, taken = np.empty((4, rows)), np.empty((4, rows), np.int32)
    for odd in range(2):
        _prices(values, kinds, bits[odd], odd, price[2 * odd : 2 * odd + 2], taken[2 * odd : 2 * odd + 2])
    # The costs of the eight states are variables, which stay in registers; the two ways into each are those of NEXT.
    came = np.empty(rows, np.uint8)
    c0, c1, c2, c3, c4, c5, c6, c7 = 0.0, 1e30, 1e30, 1e30, 1e30, 1e30, 1e30, 1e30
    for r in range(rows):
        p0, p1, p2, p3 = price[0, r], price[1, r], price[2, r], price[3, r]
        a0, b0, a1, b1 = c0 + p0, c4 + p1, c2 + p0, c6 + p1
        a2, b2, a3, b3 = c0 + p1, c4 + p0, c2 + p1, c6 + p0
        a4, b4, a5, b5 = c3 + p3, c5 + p2, c1 + p2, c7 + p3
        a6, b6, a7, b7 = c3 + p2, c5 + p3, c1 + p3, c7 + p2
        came[r] = (
            (b0 < a0) | (b1 < a1) << 1 | (b2 < a2) << 2 | (b3 < a3) << 3
            | (b4 < a4) << 4 | (b5 < a5) << 5 | (b6 < a6) << 6 | (b7 < a7) << 7
        )  # fmt: skip
        c0, c1, c2, c3 = min(a0, b0), min(a1, b1), min(a2, b2), min(a3, b3)
        c4, c5, c6, c7 = min(a4, b4), min(a5, b5), min(a6, b6), min(a7, b7)
    state = int(np.argmin(np.array([c0, c1, c2, c3, c4, c5, c6, c7])))
    for r in range(rows - 1, -1, -1):
        one = came[r] >> state & 1
        found = taken[_WAY[state, one], r]
        codes[r] = found if values[r] >= 0 else -found
        state = _SOURCE[state, one]


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
