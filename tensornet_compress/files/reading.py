"""The one door for reading: regular files of bounded size, strict JSON and text, safetensors whose hashes are checked."""

from __future__ import annotations

import json
import os
import stat
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError, safe_open
from torch import Tensor

from tensornet_compress.errors import CheckpointError, TensorNetError
from tensornet_compress.files.hashes import HASHES, check_digests, header_digest, refuse_nan
from tensornet_compress.files.whole import recovered

LARGEST_JSON = 1 << 28
LARGEST_TEXT = 1 << 31
Read = TypeVar("Read")


def read_bytes(path: str | os.PathLike[str], limit: int) -> bytes:
    """All bytes of a regular file.

    Raises:
        CheckpointError: it is missing, no regular file (a pipe could be waited for without end), or larger than ``limit``.
    """
    try:
        found = os.stat(path)
        if not stat.S_ISREG(found.st_mode):
            raise CheckpointError(f"{str(path)!r} is no regular file")
        if found.st_size > limit:
            raise CheckpointError(f"{str(path)!r} has {found.st_size:,} bytes, such a file may have {limit:,}")
        return Path(path).read_bytes()
    except OSError as error:
        raise CheckpointError(f"cannot read {str(path)!r}: {error.strerror}") from error


def read_text(path: str | os.PathLike[str], limit: int = LARGEST_TEXT) -> str:
    """A text in UTF-8.

    Raises:
        CheckpointError: as ``read_bytes``, or the file is no such text.
    """
    data = read_bytes(path, limit)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{str(path)!r} is no text in UTF-8 ({error}); convert it, or give another file") from error
    if "\0" in text:
        raise CheckpointError(f"{str(path)!r} holds zero bytes, which no text has; give a text in UTF-8")
    return text


def read_json(path: str | os.PathLike[str]) -> Any:
    """What a JSON file holds, without names given twice and numbers that JSON does not have.

    Raises:
        CheckpointError: as ``read_text``, or the text is no such JSON.
    """
    return parse_json(read_text(path, LARGEST_JSON), repr(str(path)))


def parse_json(text: str, where: str) -> Any:
    """As ``read_json``, of a text; ``where`` begins the message."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(named := dict(pairs)) < len(pairs):
            raise ValueError(f"{Counter(name for name, _ in pairs).most_common(1)[0][0]!r} is given twice")
        return named

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no number of JSON")

    try:
        return json.loads(text, object_pairs_hook=once, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where} is not JSON ({error}); the file is truncated or damaged") from error


def open_tensors(path: str | os.PathLike[str]) -> Any:
    """A safetensors file, to be read tensor by tensor inside a ``with`` block.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    if os.path.exists(path) and not os.path.isfile(path):
        raise CheckpointError(f"{str(path)!r} is no regular file")
    try:
        return safe_open(str(path), framework="pt")
    except (SafetensorError, OSError, ValueError) as error:
        if not Path(path).is_file():
            raise CheckpointError(f"there is no file at {str(path)!r}; it is missing") from error
        raise CheckpointError(
            f"{str(path)!r} cannot be read as safetensors ({error}); the file is another kind, truncated or damaged"
        ) from error


def read_tensors(path: str | os.PathLike[str], verify: bool = True) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of a safetensors file, and the texts in its header. Where the header holds hashes, they are checked, unless
    ``verify`` is false.

    Raises:
        CheckpointError: the file is missing or damaged, or a tensor holds NaN.
    """
    with open_tensors(path) as file:
        texts: dict[str, str] = file.metadata() or {}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - safe_open is no dict
    where = repr(str(path))
    hashes = parse_json(texts[HASHES], where) if HASHES in texts else None
    if verify and hashes is not None:
        if not isinstance(hashes, dict) or hashes.keys() != {"header", "tensors"} or not isinstance(hashes["tensors"], dict):
            raise CheckpointError(f"{where} holds hashes that are none; the file is damaged")
        if hashes["header"] != header_digest(texts):
            raise CheckpointError(f"{where} is damaged: its header is not the one that was written; get a whole copy of it")
        check_digests(tensors, hashes["tensors"], where)
    try:
        for name, tensor in tensors.items():
            refuse_nan(name, tensor)
    except TensorNetError as error:
        raise CheckpointError(f"{where}: {error}") from error
    return tensors, texts


def tensor_nbytes(path: Path) -> dict[str, int]:
    """Bytes of each tensor of a safetensors file, read from its header.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    with open_tensors(path):  # Refuses what is no such file.
        pass
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    ends = {name: entry["data_offsets"] for name, entry in sorted(header.items()) if name != "__metadata__"}
    return {name: end - start for name, (start, end) in ends.items()}


def steady(folder: Path, read: Callable[[Path], Read]) -> Read:
    """What ``read`` makes of a folder; read again when a writer put another one in its place meanwhile."""
    for last in (False, False, True):
        before = _identity(recovered(folder))
        try:
            found = read(folder)
        except (CheckpointError, OSError):
            if last or _identity(folder) == before:
                raise
        else:
            if last or _identity(folder) == before:
                return found
    raise AssertionError


def _identity(folder: Path) -> tuple[int, int] | None:
    try:
        found = folder.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino
