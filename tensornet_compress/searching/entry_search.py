"""The best entry sort of one tensor under the limit of a search: priced, and beside everything else."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import isfinite
from typing import Any

from torch import Tensor

from tensornet_compress.searching.entries import sort_entries

_MARGIN = 1.01
_BLOCKS = (16, 64)
_GROUPS = (2, 4, 8, 16, 32, 64)
_RANKS = (1, 2, 4)
Options = dict[str, Any]


@dataclass(frozen=True)
class EntrySort:
    """A measured entry sort: ``error`` is relative, in the metric of the search; ``nbytes`` has permutation, signs and cores.

    ``options`` are those of ``searching.entries.sort_entries``, which makes it again. It is a figure to compare with: a
    permutation of entries is no layout, so it cannot be stored or run as a ``TensorNetwork``.
    """

    options: Options
    nbytes: int
    error: float
    order_nbytes: int

    def describe(self) -> str:
        """One line."""
        given = ", ".join(f"{name}={value}" for name, value in self.options.items())
        return f"entry sort ({given}): {self.nbytes:,} bytes, {self.order_nbytes:,} of them the order, error {self.error:.3g}"


def entry_sorts(
    tensor: Tensor, error_of: Callable[[Tensor], float], keeps: Callable[[float, int], bool], alive: Callable[[], bool]
) -> list[EntrySort]:
    """Entry sorts of a tensor as a matrix (first axis, all others) that keep a limit.

    ``error_of`` measures a decoded tensor and ``keeps`` judges (error, bytes). Sorts whose permutation alone is refused at no
    error are left out.
    """
    matrix = tensor.reshape(tensor.shape[0], -1)
    if tensor.ndim < 2 or min(matrix.shape) < 2:
        return []
    found = []
    for options in _kinds(matrix.shape[0], matrix.shape[1]):
        if not alive():
            break
        fit = sort_entries(matrix, **options)
        if not keeps(0.0, fit.nbytes):
            continue
        error = error_of(fit.dense.reshape(tensor.shape))
        # Cores are fp16, which large numbers overflow.
        if isfinite(error) and keeps(error, fit.nbytes):
            found.append(EntrySort(options, fit.nbytes, error, -(-(fit.order_bits + fit.sign_bits) // 8)))
    return found


def entry_verdict(best: EntrySort | None, gain: float, luck: float) -> str:
    """What a search says of its best entry sort: ``gain`` is the network's cost over the sort's, ``luck`` the same on shuffled
    entries, 0 where no sort kept the limit."""
    if best is None:
        return "no entry sort that was tried keeps the limit"
    figures = f"cost of the network over the sort's {gain:.3f}, {luck:.3f} on shuffled entries"
    if gain <= _MARGIN:
        return f"no entry sort beats it ({figures})"
    if gain <= _MARGIN * luck:
        return f"the best entry sort gains no more than on shuffled entries ({figures})"
    return f"an entry sort would win, but cannot be stored as a network ({figures})"


def _kinds(rows: int, columns: int) -> Iterator[Options]:
    for signs in (False, True):
        extra = {"nonnegative": True} if signs else {}
        yield {"kind": "global", "rank": 2} | extra
        for rank in _RANKS:
            yield {"kind": "row", "rank": rank} | extra
        for size in _BLOCKS:
            if columns % size == 0:
                yield {"kind": "block", "size": size} | extra
        for groups in _GROUPS:
            if columns % groups == 0 and groups < columns:
                yield {"kind": "row", "groups": groups} | extra
