"""Independent jobs, each on one thread: on threads of this process, or by joblib on other processes and machines."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import closing, contextmanager, nullcontext
from contextvars import ContextVar
from functools import partial
from typing import Any, TypeVar

from joblib import Parallel, cpu_count, delayed
from joblib._parallel_backends import LokyBackend, ThreadingBackend
from joblib.externals.loky.process_executor import TerminatedWorkerError
from joblib.parallel import get_active_backend

from tensornet_compress.errors import TensorNetError
from tensornet_compress.threads import leave_if_stopped, limited_threads, stopped_by

Job = TypeVar("Job")
Result = TypeVar("Result")
_TRIES = 3
_AT_ONCE = 64
"""Jobs that are handed to a backend at once that gives back results together."""
_LOOKS = 0.5
"""Seconds between two looks: of a worker at whether its parent still lives, of a run at whether a job failed."""


class JobRoom:
    """Memory that jobs on threads of this process may take together. First come, first served: a job waits until its turn comes
    and what it needs is free, or runs alone."""

    def __init__(self, nbytes: int, need: Callable[[Any], int]):
        self.free, self.need = nbytes, need
        self._running = 0
        self._waiting: deque[object] = deque()
        self._changed = threading.Condition()

    def run(self, work: Callable[[Job], Result], job: Job) -> Result:
        """``work(job)``, when there is room for it."""
        needed, ticket = self.need(job), object()
        with self._changed:
            self._waiting.append(ticket)
            try:
                while self._waiting[0] is not ticket or (needed > self.free and self._running):
                    self._changed.wait(_LOOKS)
                    leave_if_stopped()
            finally:
                self._waiting.remove(ticket)
                self._changed.notify_all()
            self.free, self._running = self.free - needed, self._running + 1
        try:
            return work(job)
        finally:
            with self._changed:
                self.free, self._running = self.free + needed, self._running - 1
                self._changed.notify_all()


_ROOM: ContextVar[JobRoom | None] = ContextVar("room for jobs", default=None)


@contextmanager
def limited_room(room: JobRoom | None) -> Iterator[None]:
    """Inside, ``run_jobs`` keeps threads within ``room``."""
    token = _ROOM.set(room)
    try:
        yield
    finally:
        _ROOM.reset(token)


def run_jobs(
    work: Callable[[Job], Result],
    jobs: Sequence[Job],
    workers: int | None = None,
    receive: Callable[[int, Result], None] = lambda _number, _result: None,
) -> list[Result]:
    """Results of ``work(job)`` in order. Each job runs on one thread, so that results do not depend on ``workers``.

    ``workers``: threads of this process; as many as processors by default. Inside a ``cluster`` (or ``joblib.parallel_config``)
    its processes are used, on whatever machine. ``receive`` is given the number and the result of each job as they arrive. The
    jobs of a process that is killed run again.

    Raises:
        TensorNetError: processes were killed again and again without a result between.
    """
    # Threads, unless a backend was chosen.
    backend, configured = get_active_backend(prefer="threads")
    results: list[Result] = []

    def arrived(result: Result) -> None:
        results.append(result)
        receive(len(results) - 1, result)

    if isinstance(backend, ThreadingBackend):
        workers = min(workers or configured or cpu_count(), max(1, len(jobs)))
        room = _ROOM.get()
        # Jobs spend their time in compiled code, which lets other threads run.
        run = work if room is None else partial(room.run, work)
        with limited_threads(), closing(_on_threads(run, jobs, workers)) as made:
            for result in made:
                arrived(result)
        return results
    together = not backend.supports_return_generator
    options: dict[str, Any] = {"max_nbytes": "1M"}
    if isinstance(backend, LokyBackend):
        # A worker watches from its start, not from its first job: its parent may be gone before there is one.
        options |= {"n_jobs": workers or configured or -1, "initializer": _die_with, "initargs": (os.getpid(),)}
    tries = 0
    while len(results) < len(jobs):
        before = len(results)
        waiting = jobs[before:][: _AT_ONCE if together else len(jobs)]
        parallel: Any = Parallel(return_as="list" if together else "generator", **options)
        try:
            made = parallel(delayed(_single_threaded)(work, job) for job in waiting)
            with nullcontext(made) if together else closing(made) as arriving:
                for result in arriving:
                    arrived(result)
        except _lost_worker() as error:
            tries = 1 if len(results) > before else tries + 1
            if tries >= _TRIES:
                raise TensorNetError(
                    f"worker processes were killed {tries} times at the same {len(waiting)} jobs, perhaps because memory ran "
                    "out; use fewer workers"
                ) from error
    return results


def _on_threads(work: Callable[[Job], Result], jobs: Sequence[Job], workers: int) -> Generator[Result]:
    """Results in order; jobs go on while the caller writes one down.

    If a job fails, or the caller is interrupted, no other begins, and those that run are stopped at their next
    ``leave_if_stopped``: to end the process before that would end it by a signal.
    """
    failures: list[Exception] = []
    stopped = threading.Event()

    def run(job: Job) -> Result:
        with stopped_by(stopped):
            leave_if_stopped()
            try:
                return work(job)
            except Exception as error:
                failures.append(error)
                stopped.set()
                raise

    with ThreadPoolExecutor(workers) as pool:
        waiting = [pool.submit(run, job) for job in jobs]
        try:
            for future in waiting:
                while not wait([future], _LOOKS).done:
                    leave_if_stopped()
                    if failures:
                        raise failures[0]
                if failures and future.exception() is not None:  # it may be one that was stopped
                    raise failures[0]
                yield future.result()
        except BaseException:
            stopped.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


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
    with limited_threads():
        return work(job)
