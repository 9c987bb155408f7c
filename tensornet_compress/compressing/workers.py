"""Independent jobs on several processes: one small function around joblib, threads limited per job."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import closing, nullcontext
from typing import Any, TypeVar

from joblib import Parallel, delayed
from joblib._parallel_backends import LokyBackend, ThreadingBackend
from joblib.externals.loky.process_executor import TerminatedWorkerError
from joblib.parallel import get_active_backend

from tensornet_compress.errors import TensorNetError
from tensornet_compress.threads import limited_threads

Job = TypeVar("Job")
Result = TypeVar("Result")
_TRIES = 3
_AT_ONCE = 64
"""Jobs that are handed to a backend at once that gives back results together."""
_LOOKS = 0.5
"""Seconds between two looks of a worker at whether its parent still lives."""


def run_jobs(
    work: Callable[[Job], Result],
    jobs: Sequence[Job],
    workers: int | None = None,
    receive: Callable[[int, Result], None] = lambda _number, _result: None,
) -> list[Result]:
    """Results of ``work(job)`` in order. Each job runs on one thread, so that results do not depend on ``workers``.

    ``workers`` defaults to the number of processors; with one, everything runs in this process. Inside a ``cluster`` (or
    ``joblib.parallel_config`` of another backend than joblib's own) its workers are used. ``receive``
    is given the number and the result of each job as they arrive. The jobs of a worker that is killed run again.

    Raises:
        TensorNetError: workers were killed again and again without a result between.
    """
    backend: Any = get_active_backend()[0]
    apart = not isinstance(backend, LokyBackend | ThreadingBackend)
    workers = min(workers or os.cpu_count() or 1, max(1, len(jobs)))
    results: list[Result] = []
    if workers == 1 and not apart:
        for job in jobs:
            results.append(_single_threaded(work, job))
            receive(len(results) - 1, results[-1])
        return results
    # A worker watches from its start, not from its first job: its parent may be gone before there is one.
    options = {} if apart else {"n_jobs": workers, "initializer": _die_with, "initargs": (os.getpid(),)}
    together = apart and not backend.supports_return_generator
    tries = 0
    while len(results) < len(jobs):
        before = len(results)
        waiting = jobs[before:][: _AT_ONCE if together else len(jobs)]
        parallel: Any = Parallel(return_as="list" if together else "generator", max_nbytes="1M", **options)
        try:
            made = parallel(delayed(_single_threaded)(work, job) for job in waiting)
            with nullcontext(made) if together else closing(made) as arriving:
                for result in arriving:
                    results.append(result)
                    receive(len(results) - 1, result)
        except _lost_worker() as error:
            tries = 1 if len(results) > before else tries + 1
            if tries >= _TRIES:
                raise TensorNetError(
                    f"worker processes were killed {tries} times at the same {len(waiting)} jobs, perhaps because memory ran "
                    "out; use fewer workers"
                ) from error
    return results


def _lost_worker() -> tuple[type[BaseException], ...]:
    """What is raised when a worker is gone; of a cluster's packages only where they are in use."""
    ray: Any = sys.modules.get("ray")
    dask: Any = sys.modules.get("distributed")
    return (
        TerminatedWorkerError,
        *([ray.exceptions.RayError] if ray is not None else []),
        *([dask.KilledWorker] if dask is not None else []),
    )


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
