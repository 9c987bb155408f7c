"""Thread counts, changed for a while and put back; work on threads that may be stopped."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from functools import cache

import numba
import torch
from threadpoolctl import ThreadpoolController


class _Limit:
    """Who wants the libraries of this process on one thread: the first sets that, the last puts back what was before."""

    def __init__(self) -> None:
        self.lock, self.users, self.put_back = threading.Lock(), 0, ExitStack()


_LIMIT = _Limit()


class Stopped(BaseException):
    """Raised in a thread whose result nobody waits for."""


_STOP: ContextVar[threading.Event | None] = ContextVar("set when this thread's work is not wanted any more", default=None)


@contextmanager
def stopped_by(event: threading.Event) -> Iterator[None]:
    """Inside, in this thread, ``leave_if_stopped`` raises once ``event`` is set."""
    token = _STOP.set(event)
    try:
        yield
    finally:
        _STOP.reset(token)


def leave_if_stopped() -> None:
    """Called between steps of long work. (An exception that another thread sets off may come anywhere: where a compiler calls
    back into Python it ends the process by a signal.)

    Raises:
        Stopped: nobody waits for this work.
    """
    event = _STOP.get()
    if event is not None and event.is_set():
        raise Stopped


@contextmanager
def limited_threads() -> Iterator[None]:
    """Run factorisations on one thread: small LAPACK calls are much slower on several threads of a busy machine, and results
    then do not depend on their number. Several threads of Python may be inside."""
    with _LIMIT.lock:
        own = torch.get_num_threads()
        if not _LIMIT.users:
            _LIMIT.put_back.callback(torch.set_num_threads, own)
            _LIMIT.put_back.enter_context(_pools().limit(limits=1))
        _LIMIT.users += 1
        # OpenMP keeps a number for each thread that used it.
        torch.set_num_threads(1)
    try:
        yield
    finally:
        with _LIMIT.lock:
            _LIMIT.users -= 1
            if not _LIMIT.users:
                _LIMIT.put_back.close()
            if torch.get_num_threads() != own:
                for pool in _pools().select(user_api="openmp").lib_controllers:
                    pool.set_num_threads(own)


class compiled_threads:  # noqa: N801 - used like a function
    """Let loops that numba compiled run on ``count`` threads, see ``worthwhile_threads``. A class of its own, as entering a
    generator takes as long as a small product."""

    def __init__(self, count: int):
        self.count = count

    def __enter__(self) -> None:
        self.before = numba.get_num_threads()
        if self.before != self.count:
            numba.set_num_threads(self.count)

    def __exit__(self, *_: object) -> None:
        if self.before != self.count:
            numba.set_num_threads(self.before)


def worthwhile_threads(work: int, least: int) -> int:
    """As many threads as PyTorch uses, but none for less than ``least`` of the ``work``; 1 or more."""
    count = min(torch.get_num_threads(), work // least)
    if count <= 1:
        return 1
    _launch()
    return min(count, int(numba.config.NUMBA_NUM_THREADS))  # type: ignore[attr-defined]


@cache
def _launch() -> None:
    """Start numba's threads. They may come from the very pool that PyTorch uses, whose size numba then sets: it is put back."""
    before = torch.get_num_threads()
    numba.get_num_threads()
    torch.set_num_threads(before)


@cache
def _pools() -> ThreadpoolController:
    """The thread pools of all libraries, looked up once: that takes as long as a small factorisation."""
    return ThreadpoolController()
