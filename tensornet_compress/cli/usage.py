"""Wrong options end a command with one line, as any other bad input does."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer
from pydantic import ValidationError
from typer.core import TyperGroup

# Typer keeps its own copy of click, or takes the installed one: this is the class of either.
_UsageError: Any = typer.BadParameter.__base__


class PlainGroup(TyperGroup):
    """A group of commands whose usage errors are one ``error:`` line with a hint, not a box."""

    def make_context(self, *args: Any, **kwargs: Any) -> Any:
        """As in the base class."""
        with _one_line():
            return super().make_context(*args, **kwargs)

    def invoke(self, *args: Any, **kwargs: Any) -> Any:
        """As in the base class; the options of the commands below are parsed here."""
        with _one_line():
            return super().invoke(*args, **kwargs)


@contextmanager
def _one_line() -> Iterator[None]:
    try:
        yield
    except _UsageError as error:
        # A group that is called without a command shows its help, which is an error of its own kind.
        if type(error).__name__ == "NoArgsIsHelpError":
            raise
        message = " ".join(error.format_message().split()).rstrip(".")
        cause = error.__cause__
        if isinstance(cause, ValidationError):
            message += f", was given {cause.errors()[0]['input']!r}"
        hint = f"; try: {error.ctx.command_path} --help" if error.ctx is not None else ""
        typer.echo(f"error: {message}{hint}", err=True)
        raise typer.Exit(2) from error
