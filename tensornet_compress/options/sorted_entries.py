"""Sorted entries (EinSort): what they take and lose at every step between groups, told from one sort."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import Tensor

from tensornet_compress.bisection import least_kept
from tensornet_compress.coding.sorted_format import SortedFormat, SortedRuns
from tensornet_compress.metric import KroneckerMetric
from tensornet_compress.options.layer import LayerStatistics, Option
from tensornet_compress.tensor import Layout, Topology

# Steps in deviations of a run. An eighth of an octave is about an eighth of a bit.
_FINEST, _COARSEST = 2.0**-12, 2.0**4
_STEPS = tuple(4.0 * 2.0 ** (-step / 8) for step in range(65))
_SAMPLED_ROWS, _SAMPLED_SHARE = 64, 16


def sorted_options(statistics: LayerStatistics) -> Iterator[Option]:
    """Rows sorted by themselves with one profile for all, and all entries sorted together; bytes are never too low, errors are
    those of a sample of the rows."""
    matrix, shape = statistics.matrix, tuple(statistics.weight.shape)
    stride = max(1, min(len(matrix) // _SAMPLED_ROWS, _SAMPLED_SHARE))
    rows, width = slice(stride // 2, None, stride), matrix.shape[1]
    sample = matrix[rows]
    metric = KroneckerMetric(statistics.row_prices[rows], statistics.metric.columns)
    for run in dict.fromkeys((width, matrix.numel())):
        runs = SortedRuns(matrix.reshape(-1, run))
        for step in filter(runs.few, _STEPS):
            fmt, sizes = SortedFormat(run=run, step=step), runs.sizes(step)
            lost = metric.norm2(sample - runs.rows(sizes, fmt.rank, width, rows))
            spec = statistics.spec(Layout.native(shape), Topology.one_core(len(shape)), (), (fmt,))
            yield Option("sorted", spec, fmt.most_nbytes(matrix.numel(), sizes), len(matrix) / len(sample) * lost)


def sorted_within(
    tensor: Tensor,
    run: int,
    rank: int = 1,
    max_bytes: int | None = None,
    max_error: float | None = None,
    error_of: Callable[[Tensor], float] = lambda dense: 0.0,
) -> SortedFormat | None:
    """The format of runs of a tensor that loses least within ``max_bytes``, or that takes fewest within ``max_error``, which
    ``error_of`` what is decoded keeps; None where there is none."""
    runs, empty = SortedRuns(tensor.reshape(-1, run)), SortedFormat(run=run, rank=rank)

    def keeps(step: float) -> bool:
        if max_bytes is not None:
            return runs.few(step) and empty.most_nbytes(tensor.numel(), runs.sizes(step)) <= max_bytes
        if not runs.few(1 / step):
            return True
        return error_of(runs.rows(runs.sizes(1 / step), rank, run).view(tensor.shape)) <= (max_error or 0.0)

    # Of steps the least that is small enough in bytes; the inverse of the largest whose error is.
    low, high = (_FINEST, _COARSEST) if max_bytes is not None else (1 / _COARSEST, 1 / _FINEST)
    if not keeps(high):
        return None
    found = least_kept(keeps, low, high, ratio=1.01)
    step = found if max_bytes is not None else 1 / found
    return SortedFormat(run=run, rank=rank, step=step) if runs.few(step) else None
