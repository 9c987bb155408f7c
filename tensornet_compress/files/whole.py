"""Files that appear whole or not at all, and tensors with a JSON description in the header of one safetensors file."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tensornet_compress.errors import CheckpointError, TensorNetError


@contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """An empty temporary file beside ``path`` that takes its place when the block ends well, and vanishes otherwise.

    Folders above ``path`` are made.

    Raises:
        TensorNetError: ``path`` is a folder.
    """
    target = Path(path)
    if target.is_dir():
        raise TensorNetError(f"{str(path)!r} is a folder; give a file name")
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o644)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def write_described(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], key: str, description: str) -> int:
    """Write tensors to one safetensors file with ``description`` under ``key`` in its header; returns the bytes of the file."""
    with whole_file(path) as file:
        save_file({name: part.detach().cpu().contiguous() for name, part in tensors.items()}, file, {key: description})
    return Path(path).stat().st_size


def read_described(path: str | os.PathLike[str], key: str, kind: str) -> tuple[dict[str, Tensor], str]:
    """The tensors and the description of a file of ``write_described``.

    Raises:
        CheckpointError: the file is missing or damaged, or has no ``key`` in its header, so that it holds no ``kind``.
    """
    try:
        with safe_open(path, "pt") as file:
            description: str | None = (file.metadata() or {}).get(key)
            names = [] if description is None else list(file.keys())
            tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in names}
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{str(path)!r} cannot be read as safetensors ({error}); is it missing or damaged?") from error
    if description is None:
        raise CheckpointError(f"{str(path)!r} holds no {kind}, or not one that this package wrote")
    return tensors, description
