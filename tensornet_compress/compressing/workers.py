"""Independent jobs on several processes: one small function around joblib, threads limited per job."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from typing import Any, TypeVar

from joblib import Parallel, delayed
from joblib.externals.loky.process_executor import TerminatedWorkerError

from tensornet_compress.errors import TensorNetError
from tensornet_compress.threads import limited_threads

Job = TypeVar("Job")
Result = TypeVar("Result")
_TRIES = 3
_LOOKS = 0.5
"""Seconds between two looks of a worker at whether its parent still lives."""


def run_jobs(
    work: Callable[[Job], Result],
    jobs: Sequence[Job],
    workers: int | None = None,
    receive: Callable[[int, Result], None] = lambda _number, _result: None,
) -> list[Result]:
    """Results of ``work(job)`` in order. Each job runs on one thread, so that results do not depend on ``workers``.

    ``workers`` defaults to the number of processors; with one, everything runs in this process. ``receive``
    is given the number and the result of each job as they arrive. The jobs of a worker that is killed run again.

    Raises:
        TensorNetError: workers were killed again and again without a result between.
    """
    workers = min(workers or os.cpu_count() or 1, max(1, len(jobs)))
    results: list[Result] = []
    if workers == 1:
        for job in jobs:
            results.append(_single_threaded(work, job))
            receive(len(results) - 1, results[-1])
        return results
    tries = 0
    while len(results) < len(jobs):
        before = len(results)
        # A worker watches from its start, not from its first job: its parent may be gone before there is one.
        parallel: Any = Parallel(
            n_jobs=workers, return_as="generator", max_nbytes="1M", initializer=_die_with, initargs=(os.getpid(),)
        )
        try:
            with closing(parallel(delayed(_single_threaded)(work, job) for job in jobs[before:])) as stream:
                for result in stream:
                    results.append(result)
                    receive(len(results) - 1, result)
        except TerminatedWorkerError as error:
            tries = 1 if len(results) > before else tries + 1
            if tries >= _TRIES:
                raise TensorNetError(
                    f"worker processes were killed {tries} times at the same {workers} jobs, perhaps because memory ran out; "
                    "use fewer workers"
                ) from error
    return results


def _die_with(owner: int) -> None:
    """Watch the parent of this worker, and end with it, however it ends. (The signal that Linux can send at a parent's death
    comes when the thread ends that started the child, which may be long before.)"""

    def watch() -> None:
        while os.getppid() == owner:
            time.sleep(_LOOKS)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _single_threaded(work: Callable[[Job], Result], job: Job) -> Result:
    with limited_threads(1):
        return work(job)
