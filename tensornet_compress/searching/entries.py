"""Entry sorts (EinSort, 2606.08565) in a search: rows, blocks of rows or all entries are sorted, tied in groups, and kept as
one core in the number format ``SortedFormat``, whose order is entropy-coded.

The order takes nearly all bytes. It is a permutation source code: on independent entries such codes tend, as runs grow, to a
quantiser with an entropy coder (0909.0704). So a gain over other formats is as large on shuffled entries,
unless runs share their values or few values occur.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import Tensor

from tensornet_compress.coding import SortedFormat
from tensornet_compress.options.sorted_entries import sorted_within
from tensornet_compress.searching.limits import Deadline, Limit
from tensornet_compress.searching.result import Found

# Other forms fare a little better or worse on shuffled entries, where a sort of all entries is the same.
_MARGIN = 1.05
_BLOCKS = (16, 64)
_RANKS = (1, 2)


def entry_formats(
    tensor: Tensor, error_of: Callable[[Tensor], float], limit: Limit, deadline: Deadline
) -> Iterator[SortedFormat]:
    """The best format of each kind of runs for a tensor (first axis, all others) that is foretold to keep a limit."""
    if tensor.ndim < 2 or tensor.numel() < 4:
        return
    columns = tensor[0].numel()
    kinds = [(tensor.numel(), 1), *((columns, rank) for rank in _RANKS)]
    kinds += [(size, 1) for size in _BLOCKS if columns % size == 0 and size < columns]
    for run, rank in kinds:
        if deadline.passed():
            return
        found = sorted_within(tensor, run, rank, limit.max_bytes, limit.max_error, error_of)
        if found is not None:
            yield found


def entry_verdict(best: Found | None, gain: float, luck: float) -> str:
    """What a search says of its best entry sort: ``gain`` is the cost of the best other form over the sort's, ``luck`` the same
    on shuffled entries, 0 where no sort kept the limit."""
    if best is None:
        return "no entry sort that was tried keeps the limit"
    figures = f"cost of the best other form over the sort's {gain:.3f}, {luck:.3f} on shuffled entries"
    if gain <= 1:
        return f"no entry sort beats it ({figures})"
    if gain <= _MARGIN * luck:
        return f"the entry sort gains no more than on shuffled entries, by its entropy coder and not by structure ({figures})"
    return f"the entry sort gains more than on shuffled entries ({figures})"
