"""How long work reports its progress: a protocol that the command line fills with bars and a library call leaves silent."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


class Progress(Protocol):
    """Opens a stage of ``total`` steps; the context gives a function to call after each step."""

    def stage(self, title: str, total: int) -> AbstractContextManager[Callable[[], None]]:
        """A context manager whose value advances the stage by one step."""
        ...


class SilentProgress:
    """Reports nothing."""

    @contextmanager
    def stage(self, title: str, total: int) -> Iterator[Callable[[], None]]:
        """A stage whose steps go unseen."""
        yield lambda: None
