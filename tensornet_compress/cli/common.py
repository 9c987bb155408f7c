"""What every command shares: inputs, JSON output and errors as one line."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import wraps
from math import isfinite
from pathlib import Path
from typing import Any

import torch
import typer
from rich.console import Console
from torch import Tensor

from tensornet_compress.errors import TensorNetError
from tensornet_compress.files import MANIFEST, load, read_manifest
from tensornet_compress.files.whole import whole_file
from tensornet_compress.inputs import kind_of, load_causal_lm, load_tokenizer, model_kind, vocabulary_size

_PIPED_WIDTH = 160
DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def console() -> Console:
    """For tables: as wide as the terminal, or wide enough for any name where the output is piped."""
    found = Console()
    return found if found.is_terminal else Console(width=_PIPED_WIDTH)


def plain_errors(command: Callable[..., None]) -> Callable[..., None]:
    """Bad input ends a command with exit code 2 and one line, not with a traceback."""

    @wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except (TensorNetError, OSError) as error:
            message = " ".join(str(error).split())
            typer.echo(f"error: {message}", err=True)
            raise typer.Exit(2) from error

    return wrapped


def write_json(path: Path | None, content: Any) -> None:
    """Write JSON to a temporary name, then rename; nothing for ``None``."""
    if path is None:
        return
    with whole_file(path) as file:
        file.write_text(json.dumps(_finite(content), indent=2, allow_nan=False) + "\n", encoding="utf-8")


def _finite(content: Any) -> Any:
    """The same with ``None`` for infinities and NaN, which JSON does not have."""
    if isinstance(content, Mapping):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not isfinite(content) else content


def load_any(folder: str, dtype: str = "auto") -> Any:
    """A language model: a folder written by this tool, or any causal model of transformers.

    Raises:
        TensorNetError: an encoder, which neither predicts tokens nor keeps a cache.
    """
    if dtype not in DTYPES:
        raise TensorNetError(f"unknown dtype {dtype!r}; choose from {sorted(DTYPES)}")
    compressed = (Path(folder) / MANIFEST).is_file()
    architecture = read_manifest(Path(folder)).architecture if compressed else None
    if (kind_of([architecture or ""]) if compressed else model_kind(folder)) == "encoder":
        raise TensorNetError(
            f"{folder!r} is an encoder: it has no language-model head and keeps no cache; give a causal language model"
        )
    if compressed:
        return load(folder)
    return load_causal_lm(folder, DTYPES[dtype])


def load_any_tokenizer(folder: str) -> Any:
    """The tokenizer saved with a model."""
    if Path(folder).is_dir() and not (Path(folder) / "config.json").is_file():
        raise TensorNetError(f"{folder!r} is not a model folder: it has no config.json")
    return load_tokenizer(folder)


def check_vocabularies(model: str, reference: str) -> None:
    """Refuse to compare models whose answers are over different tokens.

    Raises:
        TensorNetError: their vocabularies differ in size.
    """
    sizes = [vocabulary_size(name) for name in (model, reference)]
    if sizes[0] != sizes[1]:
        raise TensorNetError(
            f"{model!r} has {sizes[0]:,} tokens in its vocabulary and {reference!r} {sizes[1]:,}, so their answers cannot be "
            "compared; give the original of the model as --reference"
        )


def figure(name: str, value: Any) -> str:
    """A figure of a table: bytes whole, other numbers to five digits."""
    if isinstance(value, float):
        return f"{value:,.0f}" if name.endswith("nbytes") else f"{value:,.5g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def text_windows(tokenizer: Any, file: Path, length: int, count: int | None) -> Tensor:
    """Windows of a text file: int64 (count, length), in order."""
    if not file.is_file():
        raise TensorNetError(f"no text file at {str(file)!r}")
    text = file.read_text(encoding="utf-8", errors="replace")
    ids = tokenizer(text, return_tensors="pt", truncation=False)["input_ids"][0]
    available = len(ids) // length
    if available == 0:
        raise TensorNetError(
            f"{str(file)!r} holds {len(ids)} tokens, fewer than one window of {length}; give more text or a smaller --length"
        )
    wanted = min(available, count) if count else available
    return ids[: wanted * length].reshape(wanted, length)
