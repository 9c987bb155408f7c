"""Orders of fibres that a search starts from."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from tensornet_compress.searching.fibres import diagonal_order, seriations
from tensornet_compress.searching.graphs import Alive
from tensornet_compress.tensor import FibreOrder

LARGEST_ASSIGNED = 1024
_LARGEST_FIBRES = 4096
_SHORTEST = 4


def fibre_starts(tensor: Tensor, alive: Alive) -> list[tuple[FibreOrder, ...]]:
    """Columns with the largest entries of a square matrix on its diagonal (hidden permutations), seriation of all axes that
    are long enough, and of each alone."""
    by_axis: dict[int, dict[str, FibreOrder]] = {}
    for axis, size in enumerate(tensor.shape):
        if _SHORTEST <= size <= _LARGEST_FIBRES and tensor.ndim > 1 and alive():
            by_axis[axis] = seriations(tensor, axis, alive)
    found = _diagonal(tensor)
    for name in ("path", "smooth", "spectral"):
        orders = tuple(named[name] for named in by_axis.values() if name in named)
        if orders and orders not in found:
            found.append(orders)
        found += [(order,) for order in orders if len(orders) > 1 and name == "path"]
    return found


def _diagonal(tensor: Tensor) -> list[tuple[FibreOrder, ...]]:
    if tensor.ndim != 2 or tensor.shape[0] != tensor.shape[1] or len(tensor) > LARGEST_ASSIGNED:
        return []
    order = diagonal_order(tensor)
    return [(FibreOrder(axis=1, permutation=tuple(order)),)] if order != list(range(len(order))) else []


def changed_orders(orders: Sequence[Sequence[int]]) -> tuple[FibreOrder, ...]:
    """The orders of axes that are not the native ones."""
    return tuple(
        FibreOrder(axis=axis, permutation=tuple(order))
        for axis, order in enumerate(orders)
        if list(order) != list(range(len(order)))
    )
