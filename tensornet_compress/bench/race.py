"""Contenders timed in turn, so that drift of the machine cancels in their ratios."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from statistics import median
from time import perf_counter, process_time

import torch

WARM_UP = 2


def clock() -> Callable[[], float]:
    """Processor time where one thread runs, so that other work on the machine does not count; else the wall clock."""
    return process_time if torch.get_num_threads() == 1 else perf_counter


def clock_name() -> str:
    """What ``clock`` reads, in words."""
    return "processor" if torch.get_num_threads() == 1 else "wall"


def race(contenders: Mapping[str, Callable[[], object]], rounds: int, least: float = 0.01) -> dict[str, float]:
    """Median seconds per call of each contender. Every round times all of them, in turning order, each on as many calls as
    take ``least`` seconds."""
    read = clock()
    repeats: dict[str, int] = {}
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    with torch.no_grad():
        for name, call in contenders.items():
            for _ in range(WARM_UP):
                call()
            began = perf_counter()
            call()
            repeats[name] = max(1, int(least / max(perf_counter() - began, 1e-6)))
        for number in range(rounds):
            order = list(contenders) if number % 2 else list(contenders)[::-1]
            for name in order:
                began = read()
                for _ in range(repeats[name]):
                    contenders[name]()
                samples[name].append((read() - began) / repeats[name])
    return {name: median(values) for name, values in samples.items()}
