"""``search``: the layout, topology, ranks and formats of fewest bytes for one tensor, and whether ordering helped."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from time import perf_counter

from torch import Tensor

from tensornet_compress.metric import KroneckerMetric
from tensornet_compress.options.offered import SEARCH_FAMILIES, SearchFamily
from tensornet_compress.progress import Progress, SilentProgress
from tensornet_compress.searching.checks import check_formats, check_metric, check_names, check_numbers, check_tensor
from tensornet_compress.searching.control import controlled, shuffles
from tensornet_compress.searching.engine import Search
from tensornet_compress.searching.limit import KNOWN_ORDERINGS, ORDERINGS, Limit, Ordering
from tensornet_compress.searching.result import Null, SearchResult
from tensornet_compress.threads import limited_threads


def search(
    tensor: Tensor,
    *,
    max_error: float | None = None,
    max_bytes: int | None = None,
    metric: KroneckerMetric | None = None,
    orderings: Sequence[Ordering] = ORDERINGS,
    topologies: Sequence[SearchFamily] = SEARCH_FAMILIES,
    formats: Sequence[str] | None = None,
    time_budget: float = 60.0,
    null: bool = True,
    seed: int = 0,
    progress: Progress | None = None,
) -> SearchResult:
    """Find the network of fewest bytes within a relative error, or of least error within a number of bytes.

    Spectra of unfoldings are computed once and predict every candidate; only the best few are decomposed and measured. Dense
    (quantised) forms and all native orders always compete. An ordering is accepted only when it lowers the total, its own
    bytes included, by more than the same search does on the same entries shuffled: by 1 %, or, where shuffles differ, by 4 of
    their standard deviations (``searching.control.needed``).

    Args:
        tensor: real, any shape and floating dtype. Errors are of numbers decoded in at least single precision; ``to_dense`` of
            a half precision tensor rounds them once more.
        max_error: relative error in the metric, 0 or more. max_bytes: stored bytes. Exactly one of them.
        metric: of a matrix (first axis, all others); Euclidean by default. It measures and fits; predictions are Euclidean.
        orderings: what may be ordered: ``mode`` (the digits), ``fibre`` (entries along an axis, charged as packed) and, only
            when asked for, ``entry`` (EinSort: all entries sorted, charged as packed). Entry sorts compete for
            ``result.entry_sort``; ``best`` stays a network, as a permutation of entries cannot be stored as one.
        topologies: families that compete besides ``dense``.
        formats: number formats of all cores; by default dense and network formats from 2-bit integers to fp32.
        time_budget: seconds, null control included (about half); the best so far is returned when they are over or on an
            interrupt (Ctrl-C), and then depends on the speed of the machine. Without its control no ordering counts.
        null: whether to run the null control (of shuffles by ``seed``: one, or several where a gain is not much above its
            luck); without it any gain counts.

    It runs on one thread, so that results do not depend on their number.

    Raises:
        TensorNetError: bad input, or no form fits into ``max_bytes``.
    """
    limit = Limit(max_error, max_bytes)
    check_formats(formats)
    check_numbers(time_budget, seed)
    check_names("orderings", orderings, KNOWN_ORDERINGS)
    check_names("topologies", topologies, SEARCH_FAMILIES)
    check_tensor(tensor)
    check_metric(metric, tensor)
    metric = None if metric is None else metric.to(tensor.device)
    formats, started = (tuple(formats) if formats is not None else None), perf_counter()
    deadline = started + time_budget
    make = partial(Search, limit=limit, metric=metric, orderings=orderings, families=topologies, formats=formats)

    def luck(shuffled: Tensor) -> Null | None:
        other = make(shuffled, deadline=deadline)
        return None if other.interrupted() else other.as_null()

    control: Null | None = None
    with (progress or SilentProgress()).stage("search", 2 if null else 1) as advance, limited_threads():
        run = make(tensor, deadline=started + time_budget * (0.5 if null else 1.0))
        interrupted = run.interrupted()
        advance()
        if null and not interrupted:
            gain = run.gain() if run.choice().ordered else 1.0
            control = controlled(shuffles(tensor, seed), luck, gain, lambda: perf_counter() < deadline)
            advance()
    return run.result(control, null, perf_counter() - started)
