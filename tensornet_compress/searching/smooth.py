"""Orders of fibres without kinks: where fibres run past each other (a wave and its reflection), a shortest path leaps between
them, and only the direction of the steps tells the two apart."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

_STARTS = 8
_PASSES = 20
_LARGEST_MENDED = 1024


def kinks(distances: np.ndarray, order: Sequence[int] | np.ndarray) -> float:
    """The sum of the squared second differences ``|x - 2 y + z|^2`` along an order, from squared distances (n, n)."""
    path = np.asarray(order)
    return float(_kink(distances, path[:-2], path[1:-1], path[2:]).sum())


def smooth_fibres(distances: np.ndarray, path: Sequence[int], alive: Callable[[], bool] = lambda: True) -> list[int]:
    """Of ``path`` and of orders that grow from some of its steps, the one with the least ``kinks``.

    An order grows at both ends, each time by the fibre that lies nearest to where the last step leads; then reversals of
    parts take out kinks that are left (of up to 1,024 fibres). ``alive``: False once the time is up.
    """
    count = len(distances)
    if count < 4:
        return list(path)
    starts = np.unique(np.linspace(0, count - 2, _STARTS).astype(int))
    grown = [_grown(distances, path[start], path[start + 1]) for start in starts if alive()]
    if not grown:
        return list(path)
    best = min(grown, key=lambda order: kinks(distances, order))
    if count <= _LARGEST_MENDED:
        best = _mended(distances, best, alive)
    return best.tolist() if kinks(distances, best) < kinks(distances, path) else list(path)


def _kink(distances: np.ndarray, a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    return np.asarray(2 * distances[a, b] + 2 * distances[b, c] - distances[a, c])


def _grown(distances: np.ndarray, first: int, second: int) -> np.ndarray:
    left = np.ones(len(distances), bool)
    left[[first, second]] = False
    ends = [[first], [second]]
    inner = [second, first]

    def following(end: int) -> tuple[float, int]:
        a, b = inner[end], ends[end][-1]
        # |x - (2 b - a)|^2 from squared distances alone.
        away = np.where(left, 2 * distances[b] - distances[a] + 2 * distances[a, b], np.inf)
        return float(away.min()), int(away.argmin())

    nearest = [following(0), following(1)]
    for _ in range(len(distances) - 2):
        end = int(nearest[1][0] < nearest[0][0])
        chosen = nearest[end][1]
        left[chosen] = False
        inner[end] = ends[end][-1]
        ends[end].append(chosen)
        nearest[end] = following(end)
        if nearest[1 - end][1] == chosen:
            nearest[1 - end] = following(1 - end)
    return np.asarray(ends[0][::-1] + ends[1])


def _mended(distances: np.ndarray, order: np.ndarray, alive: Callable[[], bool]) -> np.ndarray:
    """From each place in turn the reversal that takes out most, until a pass over all places changes nothing. Two fibres at no
    distance from any other stand before the first and two after the last."""
    count = len(order)
    padded = np.pad(distances, (0, 4))
    order = np.concatenate([[count, count + 1], order, [count + 2, count + 3]])

    def kink(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
        return np.where((a < count) & (b < count) & (c < count), _kink(padded, a, b, c), 0.0)

    least = 1e-9 * max(kinks(padded, order[2:-2]), 1e-300)
    for _ in range(_PASSES):
        if not alive():
            break
        changed = False
        for i in range(1, count):
            # Places i+1 .. j are reversed, for every j from i+2 to the last fibre.
            last = np.arange(i + 2, count + 2)
            a, b, c, d = (np.full(len(last), order[i + step]) for step in (-1, 0, 1, 2))
            w, x, y, z = (order[last + step] for step in (-1, 0, 1, 2))
            before = kink(a, b, c) + kink(b, c, d) + kink(w, x, y) + kink(x, y, z)
            after = kink(a, b, x) + kink(b, x, w) + kink(d, c, y) + kink(c, y, z)
            gain = before - after
            if len(gain) and gain.max() > least:
                stop = int(last[gain.argmax()]) + 1
                order[i + 1 : stop] = order[i + 1 : stop][::-1].copy()
                changed = True
        if not changed:
            break
    return order[2:-2]
