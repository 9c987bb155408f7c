"""Scratch folders in the system's temporary folder, swept by the next run where a process was killed before it could."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import time
from pathlib import Path

_OWNER = "owner"
_PREFIX = "tensornet-scratch-"
_YOUNG = 60.0


class ScratchFolder(tempfile.TemporaryDirectory[str]):
    """A temporary folder that exists until ``cleanup``, the end of its ``with`` block, or of this object."""

    def __init__(self) -> None:
        _sweep()
        super().__init__(prefix=_PREFIX)
        # Whoever can lock this file knows that its owner is gone.
        self._owner = (Path(self.name) / _OWNER).open("w")
        fcntl.flock(self._owner, fcntl.LOCK_EX)


def _sweep() -> None:
    for folder in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        try:
            if folder.lstat().st_uid != os.getuid():
                continue
            with (folder / _OWNER).open("r") as owner:
                fcntl.flock(owner, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
        except FileNotFoundError:
            # Killed before it had an owner, or only just being made.
            if folder.exists() and time.time() - folder.stat().st_mtime > _YOUNG:
                shutil.rmtree(folder, ignore_errors=True)
        except OSError:
            continue  # in use
