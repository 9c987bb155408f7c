"""What every command shares: errors as one line, tables, progress, JSON, and the models and texts that options name."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from math import isfinite
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from pydantic import ValidationError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor
from typer.core import TyperGroup

from tensornet_compress.errors import TensorNetError
from tensornet_compress.files import MANIFEST, load, read_manifest
from tensornet_compress.files.manifest import check_files
from tensornet_compress.files.reading import read_text
from tensornet_compress.files.whole import check_file, check_folder, locked, whole_file
from tensornet_compress.inputs import kind_of, load_causal_lm, load_tokenizer, model_kind, vocabulary_size

DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_PIPED_WIDTH = 160
# Typer keeps its own copy of click, or takes the installed one: this is the class of either.
_UsageError: Any = typer.BadParameter.__base__

AnyModel = Annotated[str, typer.Argument(help="Model folder (compressed or not), hub id or embedded name.")]
Dtype = Annotated[str, typer.Option(help="Dtype to load a plain model in: auto, float32, bfloat16 or float16.")]
Length = Annotated[int, typer.Option(help="Tokens per window.", min=2)]
Calibration = Annotated[Path | None, typer.Option(help="Text file; the bundled Wikipedia sample by default.")]
TrustRemoteCode = Annotated[
    bool,
    typer.Option("--trust-remote-code", help="Run Python code that the model brings; never by default."),
]
JsonFile = Annotated[Path | None, typer.Option("--json", help="Also write the result to this JSON file.")]


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
        if isinstance(error.__cause__, ValidationError):
            message += f", was given {error.__cause__.errors()[0]['input']!r}"
        hint = f"; try: {error.ctx.command_path} --help" if error.ctx is not None else ""
        typer.echo(f"error: {message}{hint}", err=True)
        raise typer.Exit(2) from error


quiet = {"progress": False}
"""Set by ``tensornet-compress --quiet``."""


class RichProgress:
    """Bars with time left, on standard error so that standard output stays clean (a ``Progress`` of this package); nothing
    with ``--quiet``."""

    def __init__(self) -> None:
        self.console = Console(stderr=True, quiet=quiet["progress"])

    @contextmanager
    def stage(self, title: str, total: int) -> Iterator[Callable[[], None]]:
        """One bar per stage; without a terminal, one line per finished stage."""
        columns = (TextColumn("{task.description:<12}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, TextColumn("left"), TimeRemainingColumn(), console=self.console) as progress:
            task = progress.add_task(title, total=max(total, 1))
            yield lambda: progress.advance(task)
            progress.update(task, completed=max(total, 1))

    def say(self, line: str) -> None:
        """A line above the bar."""
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Rich would end the process here; how it ends is for ``cli/ending.py`` to say."""
        raise


def console() -> Console:
    """For tables: as wide as the terminal, or wide enough for any name where the output is piped."""
    # Names of files and layers are shown as they are.
    terminal = _Console(markup=False)
    return terminal if terminal.is_terminal else _Console(width=_PIPED_WIDTH, markup=False)


def print_figures(figures: Mapping[str, Any]) -> None:
    """A table of names and values."""
    table = Table("figure", "value")
    for name, value in figures.items():
        table.add_row(name, figure(name, value))
    console().print(table)


def figure(name: str, value: Any) -> str:
    """A figure of a table: bytes whole, other numbers to five digits."""
    if isinstance(value, float):
        return f"{value:,.0f}" if name.endswith("nbytes") else f"{value:,.5g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def writes(place: Callable[[Mapping[str, Any]], Path]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make a command hold the lock of the folder that it will write, which ``place`` reads off its options, from its start."""

    def wrap(command: Callable[..., None]) -> Callable[..., None]:
        @wraps(command)
        def wrapped(**given: Any) -> None:
            target = place(given)
            check_folder(target)
            with locked(target):
                command(**given)

        return wrapped

    return wrap


def check_json(path: Path | None, *inputs: str | Path | None) -> None:
    """Refuse a ``--json`` that cannot be written, or would replace what the command reads, before the work is done."""
    check_output("--json", path, *inputs)


def check_output(option: str, path: Path | None, *inputs: str | Path | None) -> None:
    """Refuse a file that cannot be written, or would replace one of the inputs or a file in one of them."""
    if path is None:
        return
    check_file(path, option)
    real = path.resolve()
    for given in inputs:
        source = None if given is None else Path(given).resolve()
        if source is not None and (real == source or (source in real.parents and real.exists())):
            raise TensorNetError(f"{option} {str(path)!r} would replace what is read from {str(given)!r}; choose another place")


def write_json(path: Path | None, content: Any) -> None:
    """What a command found, for scripts; ``null`` for infinities and NaN, which JSON does not have."""
    if path is not None:
        with whole_file(path) as file:
            file.write_text(json.dumps(_finite(content), indent=2, allow_nan=False) + "\n", encoding="utf-8")


def _finite(content: Any) -> Any:
    if isinstance(content, Mapping):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not isfinite(content) else content


def invocation() -> str:
    """The command line that is running, to be told in a report."""
    return shlex.join(["tensornet-compress", *sys.argv[1:]])


def load_any(folder: str, dtype: str = "auto", trust: bool = False) -> Any:
    """A language model: a folder written by this tool, or any causal model of transformers.

    Raises:
        TensorNetError: an encoder, which neither predicts tokens nor keeps a cache.
    """
    check_dtype(dtype)
    compressed = (Path(folder) / MANIFEST).is_file()
    kind = kind_of([read_manifest(Path(folder)).architecture or ""]) if compressed else model_kind(folder, trust)
    if kind == "encoder":
        raise TensorNetError(
            f"{folder!r} is an encoder: it has no language-model head and keeps no cache; give a causal language model"
        )
    return load(folder) if compressed else load_causal_lm(folder, DTYPES[dtype], trust)


def check_dtype(dtype: str) -> None:
    """Refuse a dtype that is not in ``DTYPES``."""
    if dtype not in DTYPES:
        raise TensorNetError(f"unknown dtype {dtype!r}; choose from {sorted(DTYPES)}")


def load_any_tokenizer(folder: str, trust: bool = False) -> Any:
    """The tokenizer saved with a model."""
    if Path(folder).is_dir() and not (Path(folder) / "config.json").is_file():
        raise TensorNetError(f"{folder!r} is not a model folder: it has no config.json")
    if (Path(folder) / MANIFEST).is_file():
        check_files(Path(folder), read_manifest(folder))
    return load_tokenizer(folder, trust)


def check_vocabularies(model: str, reference: str, trust: bool = False) -> None:
    """Refuse to compare models whose answers are over different tokens.

    Raises:
        TensorNetError: their vocabularies differ in size.
    """
    sizes = [vocabulary_size(name, trust) for name in (model, reference)]
    if sizes[0] != sizes[1]:
        raise TensorNetError(
            f"{model!r} has {sizes[0]:,} tokens in its vocabulary and {reference!r} {sizes[1]:,}, so their answers cannot be "
            "compared; give the original of the model as --reference"
        )


def text_windows(tokenizer: Any, file: Path, length: int, count: int) -> Tensor:
    """Windows of a text file, at most ``count``: int64 (windows, length), in order."""
    if not file.exists():
        raise TensorNetError(f"no text file at {str(file)!r}")
    text = read_text(file)
    ids = tokenizer(text, return_tensors="pt", truncation=False)["input_ids"][0]
    wanted = min(len(ids) // length, count)
    if not wanted:
        raise TensorNetError(
            f"{str(file)!r} holds {len(ids)} tokens, fewer than one window of {length}; give more text or a smaller --length"
        )
    return ids[: wanted * length].reshape(wanted, length)
