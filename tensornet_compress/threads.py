"""Thread counts, changed for a while and put back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

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


@cache
def _pools() -> ThreadpoolController:
    """The thread pools of all libraries, looked up once: that takes as long as a small factorisation."""
    return ThreadpoolController()
