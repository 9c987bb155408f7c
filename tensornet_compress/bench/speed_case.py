"""Races: contenders of one subject, measured in one run, so that drift of the machine cancels in their ratios."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import median
from time import perf_counter, process_time
from typing import Any, ClassVar

import torch

from tensornet_compress.bench.registry import Registry
from tensornet_compress.bench.run import Settings

OURS = "ours"
WARM_UP = 2


@dataclass(frozen=True)
class SpeedSettings(Settings):
    """What a run of ``bench speed`` does. ``tracks``: which races, all for ``None``; ``rounds``: timings of each contender;
    ``context``: tokens cached before decoding; ``steps``: tokens decoded in a round."""

    FULL: ClassVar[Mapping[str, Any]] = {
        "rounds": 41, "batches": (1, 32, 512), "context": 4096, "steps": 12, "budget": 60.0,
    }  # fmt: skip
    model: str = "smollm2-135m"
    text: str = "wikipedia"
    tracks: tuple[str, ...] | None = None
    rounds: int = 7
    batches: tuple[int, ...] = (1, 256)
    keep: float = 0.6
    context: int = 512
    steps: int = 3
    bits: float = 4.5
    budget: float = 20.0


@dataclass(frozen=True)
class Raced:
    """What a race found. ``values``: contender -> measure -> value (``time``: seconds per call); ``missing``: the reason of
    those that could not run."""

    values: Mapping[str, Mapping[str, float]]
    missing: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Heat:
    """One race: ``run`` measures everybody at once. ``contenders`` are known before it is run; names of ours begin with
    ``ours``."""

    subject: str
    contenders: tuple[str, ...]
    run: Callable[[], Raced]


@dataclass(frozen=True)
class Track:
    """A kind of race: settings -> heats."""

    name: str
    heats: Callable[[SpeedSettings], Iterator[Heat]]


TRACKS: Registry[Track] = Registry("track")


def thread_counts() -> tuple[int, ...]:
    """1, and as many as there are processors."""
    return tuple(sorted({1, len(os.sched_getaffinity(0))}))


@contextmanager
def on_threads(count: int) -> Iterator[None]:
    """PyTorch on a number of threads."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(count)
        yield
    finally:
        torch.set_num_threads(before)


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
            for name in list(contenders) if number % 2 else list(contenders)[::-1]:
                began = read()
                for _ in range(repeats[name]):
                    contenders[name]()
                samples[name].append((read() - began) / repeats[name])
    return {name: median(values) for name, values in samples.items()}
