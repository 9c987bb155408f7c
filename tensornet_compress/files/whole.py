"""Files and folders that appear whole or not at all, and safetensors files with texts in their header."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

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


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """A temporary folder beside ``target`` that takes its place when the block ends well, and vanishes otherwise."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        temporary.chmod(0o755)
        yield temporary
        if target.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.parent))
            os.replace(target, old / "old")
            os.replace(temporary, target)
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.replace(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_tensors(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> int:
    """Write a safetensors file, whole or not at all; returns its bytes. Tensors may share memory, and are stored apart."""
    plain: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        part = tensor.detach().cpu().contiguous()
        plain[name] = part.clone() if part.untyped_storage().data_ptr() in storages else part
        storages.add(plain[name].untyped_storage().data_ptr())
    with whole_file(path) as file:
        save_file(plain, file, dict(header) or None)
    return Path(path).stat().st_size


def open_tensors(path: str | os.PathLike[str]) -> Any:
    """A safetensors file, to be read tensor by tensor inside a ``with`` block.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    try:
        return safe_open(str(path), framework="pt")
    except (SafetensorError, OSError, ValueError) as error:
        state = "truncated or damaged" if Path(path).is_file() else "missing"
        raise CheckpointError(f"{str(path)!r} cannot be read as safetensors ({error}); the file is {state}") from error


def read_tensors(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of a safetensors file, and the texts in its header.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    with open_tensors(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
