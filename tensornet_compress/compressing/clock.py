"""Stages of a long job: progress and seconds."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tensornet_compress.progress import Progress


class Clock:
    """Stages with their seconds."""

    def __init__(self, progress: Progress):
        self.progress = progress
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, title: str, total: int) -> Iterator[Callable[[], None]]:
        started = time.perf_counter()
        with self.progress.stage(title, total) as advance:
            yield advance
        self.seconds[title] = round(time.perf_counter() - started, 3)
