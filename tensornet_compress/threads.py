"""Thread counts, changed for a while and put back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import numba
import torch
from threadpoolctl import ThreadpoolController


@contextmanager
def limited_threads(count: int = 1) -> Iterator[None]:
    """Run factorisations on ``count`` threads: small LAPACK calls are much slower on several threads of a busy machine."""
    before, pools = torch.get_num_threads(), _pools()
    if before == count and all(pool.num_threads == count for pool in pools.lib_controllers):
        yield
        return
    try:
        with pools.limit(limits=count):
            torch.set_num_threads(count)
            yield
    finally:
        torch.set_num_threads(before)


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
