"""The bisection behind every budget: the least price, or step, at which what is bought stays within it."""

from __future__ import annotations

from collections.abc import Callable


def least_kept(keeps: Callable[[float], bool], low: float, high: float, *, steps: int = 200, ratio: float = 1.0) -> float:
    """The least number between ``low`` and ``high`` that ``keeps``, found by bisection of its logarithm.

    ``keeps`` should be False below that number and True above it. It is not asked at the two ends: ``high`` is the answer where
    nothing below it is kept. Ends after ``steps``, when high / low is below ``ratio``, or when no number lies between them.

    >>> round(least_kept(lambda price: 1000 / price <= 30, 1e-9, 1e9), 6)
    33.333333
    """
    for _ in range(steps):
        middle = (low * high) ** 0.5 if low > 0 else high / 2
        if not low < middle < high or high < ratio * low:
            break
        low, high = (low, middle) if keeps(middle) else (middle, high)
    return high


def bracket(keeps: Callable[[float], bool], start: float = 1e-30, end: float = 1e60) -> tuple[float, float]:
    """Bounds for ``least_kept`` where none are known: the last number that is not kept (0 where ``start`` is) and the first
    that is, of powers of 10,000 times ``start``.

    Raises:
        ValueError: nothing up to ``end`` is kept.
    """
    low, high = 0.0, start
    while not keeps(high):
        low, high = high, high * 1e4
        if high > end:
            raise ValueError(f"nothing up to {end:g} is kept")
    return low, high
