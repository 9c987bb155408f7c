"""Work in a process of its own: what it costs in time and memory, undisturbed by what came before."""

from __future__ import annotations

import gc
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from time import perf_counter, process_time
from typing import Any, TypeVar

import torch
from joblib.externals.loky import get_reusable_executor

from tensornet_compress.bench.peer_packages import Unavailable
from tensornet_compress.memory import peak_of_all, resident_bytes, trim

Made = TypeVar("Made")


@dataclass(frozen=True)
class Cost:
    """``seconds`` of the clock and of the processor; ``peak_nbytes``: most memory held, by workers too, less that before it."""

    seconds: float
    processor_seconds: float
    peak_nbytes: int


def apart(work: Callable[..., Made], *given: Any, threads: int = 1) -> Made:
    """``work(*given)`` in a fresh process; all of them must be picklable, and an error is raised here."""
    with ProcessPoolExecutor(1, get_context("spawn"), initializer=torch.set_num_threads, initargs=(threads,)) as pool:
        return pool.submit(work, *given).result()


def cost_apart(prepare: Callable[..., Callable[[], Made]], *given: Any, threads: int = 1) -> tuple[Made, Cost]:
    """In a fresh process, ``prepare(*given)`` and then, measured, the work that it gave back."""
    return apart(_measured, prepare, given, threads=threads)


def _measured(prepare: Callable[..., Callable[[], Made]], given: tuple[Any, ...]) -> tuple[Made, Cost]:
    work = prepare(*given)
    before = resident()
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak is counted from here on
    except OSError as error:
        raise Unavailable(f"peak memory is reset by /proc/self/clear_refs: {error.strerror}") from error
    wall, processor = perf_counter(), process_time()
    made = work()
    cost = Cost(perf_counter() - wall, process_time() - processor, _known(peak_of_all()) - before)
    # Idle workers would keep this process for minutes.
    get_reusable_executor().shutdown(wait=True, kill_workers=True)
    return made, cost


def resident() -> int:
    """Bytes that this process holds, free pages handed back first. Raises ``Unavailable`` where the system does not tell."""
    gc.collect()
    trim()
    return _known(resident_bytes())


def _known(nbytes: int | None) -> int:
    if nbytes is None:
        raise Unavailable("memory is read from /proc/self/status, which this system does not have")
    return nbytes
