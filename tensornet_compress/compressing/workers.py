"""Independent jobs on several processes: one small function around joblib, threads limited per job."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from joblib import Parallel, delayed

from tensornet_compress.threads import limited_threads

Job = TypeVar("Job")
Result = TypeVar("Result")


def run_jobs(
    work: Callable[[Job], Result],
    jobs: Sequence[Job],
    workers: int | None = None,
    advance: Callable[[], None] = lambda: None,
) -> list[Result]:
    """Results of ``work(job)`` in order. Each job runs on one thread, so that results do not depend on ``workers``.

    ``workers`` defaults to the number of processors; with one, everything runs in this process. ``advance`` is called as
    results arrive.
    """
    workers = min(workers or os.cpu_count() or 1, max(1, len(jobs)))
    if workers == 1:
        results = []
        for job in jobs:
            results.append(_single_threaded(work, job))
            advance()
        return results
    results = []
    stream: Any = Parallel(n_jobs=workers, return_as="generator", max_nbytes="1M")(
        delayed(_single_threaded)(work, job) for job in jobs
    )
    for result in stream:
        results.append(result)
        advance()
    return results


def _single_threaded(work: Callable[[Job], Result], job: Job) -> Result:
    with limited_threads(1):
        return work(job)
