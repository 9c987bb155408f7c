"""Files that appear whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tensornet_compress.errors import TensorNetError


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
