"""Least bytes that any code of shuffled tables takes on average, even one that knows the table in order.

A decoded table within an error of two shuffled ones makes these at most twice that error apart, so that one code word can stand
for no more orders than lie that near to each other, and the average code takes at least ``log2 n!`` bits less the logarithm of
their number. That number is at most ``exp(t D) perm(exp(-t d))`` for distances ``d`` between fibres, a squared error ``D`` and
every ``t > 0``, and the permanent at most the product of the scalings that make all rows of the matrix sum to 1. Of several
axes each is bounded while the orders of those before it are known and those of the others are not: entries are sorted along
these, which brings no two tables further apart.
"""

from __future__ import annotations

from itertools import permutations
from math import lgamma, log

import numpy as np
from torch import Tensor

_TRIED = 40
_SCALINGS = 40


def least_order_nbytes(tensor: Tensor, error: float) -> float:
    """Bytes that a code within the relative ``error`` (above 0) takes at least, on average over all orders of all axes, when
    nothing but the orders is to be told."""
    if not error > 0:
        raise ValueError(f"the bound is for errors above 0, was given {error}")
    table = tensor.double().cpu().numpy()
    most = (2 * error) ** 2 * float((table**2).sum())
    return max(
        0.0, *(sum(_axis_bytes(table, known, most) for known in _chain(order)) for order in permutations(range(table.ndim)))
    )


def _chain(order: tuple[int, ...]) -> list[tuple[int, tuple[int, ...]]]:
    """Each axis with those whose orders are not yet known."""
    return [(axis, order[place + 1 :]) for place, axis in enumerate(order)]


def _axis_bytes(table: np.ndarray, step: tuple[int, tuple[int, ...]], most: float) -> float:
    axis, unknown = step
    known = [other for other in range(table.ndim) if other != axis and other not in unknown]
    count = table.shape[axis]
    fibres = table.transpose(axis, *known, *unknown).reshape(count, int(np.prod([table.shape[a] for a in known])), -1)
    fibres = np.sort(fibres, axis=2).reshape(count, -1)
    norms = (fibres**2).sum(1)
    distances = np.maximum(norms[:, None] + norms - 2 * fibres @ fibres.T, 0.0)
    return max(0.0, lgamma(count + 1) - near_orders(distances, most)) / log(256)


def near_orders(distances: np.ndarray, most: float) -> float:
    """An upper bound of the logarithm of the number of permutations ``p`` with ``sum_i distances[i, p(i)] <= most``."""
    count = len(distances)
    bounds = []
    for weight in np.geomspace(0.1, 100, _TRIED) * count / most:
        kernel = np.exp(-weight * distances)
        columns = np.ones(count)
        for _ in range(_SCALINGS):
            rows = 1 / (kernel @ columns)
            columns = 1 / (rows @ kernel)
        rows = 1 / (kernel @ columns)
        bounds.append(weight * most - float(np.log(rows).sum() + np.log(columns).sum()))
    return min(bounds)
