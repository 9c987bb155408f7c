"""Progress bars with time left, on standard error so that standard output stays clean."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class RichProgress:
    """Implements ``tensornet_compress.progress.Progress`` with rich."""

    def __init__(self) -> None:
        self.console = Console(stderr=True)

    @contextmanager
    def stage(self, title: str, total: int) -> Iterator[Callable[[], None]]:
        """One bar per stage; without a terminal, one line per finished stage."""
        columns = (
            TextColumn("{task.description:<12}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self.console) as progress:
            task = progress.add_task(title, total=max(total, 1))
            yield lambda: progress.advance(task)
            progress.update(task, completed=max(total, 1))

    def say(self, line: str) -> None:
        """A line above the bar."""
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)
