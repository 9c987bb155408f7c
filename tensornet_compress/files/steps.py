"""The finished steps of a long job and what they gave, kept beside its target, so that a killed job goes on from there."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tensornet_compress.errors import CheckpointError, TensorNetError
from tensornet_compress.files.hashes import check_seal, file_digest, sealed
from tensornet_compress.files.reading import LARGEST_JSON, parse_json, read_text
from tensornet_compress.files.scratch import ScratchFolder
from tensornet_compress.files.whole import locked, sync, whole_file

_SETTINGS = "settings"
_HASH = re.compile("[0-9a-f]{32,}")


class DamagedStepError(TensorNetError):
    """A record of a finished step, or a file of it, is not what was written."""

    def __init__(self, file: Path, why: str):
        super().__init__(f"{str(file)!r}, a step of an earlier run, is damaged ({why}); start over with fresh=True (--fresh)")


class Steps:
    """A folder for the files of a job. Without ``lasting`` nothing is recorded, and nothing found."""

    def __init__(self, folder: Path, lasting: bool = True):
        self.folder, self.lasting = folder, lasting
        self._scratch: ScratchFolder | None = None

    @classmethod
    def passing(cls) -> Steps:
        """Steps in a temporary folder that goes with this object."""
        scratch = ScratchFolder()
        steps = cls(Path(scratch.name), lasting=False)
        steps._scratch = scratch
        return steps

    @classmethod
    def nowhere(cls) -> Steps:
        """Steps without a folder, for jobs that write no files."""
        return cls(Path(os.devnull), lasting=False)

    def found(self, step: str) -> Any:
        """What a finished step gave; None while it is not finished.

        Raises:
            DamagedStepError: its record, or a file of it that is still there, is not what was written.
        """
        record = self.folder / f"{step}.json"
        if not (self.lasting and record.is_file()):
            return None
        try:
            text = read_text(record, LARGEST_JSON)
            check_seal(text, repr(str(record)))
            known = parse_json(text, repr(str(record)))
            given, files = known["given"], dict(known["files"])
        except (CheckpointError, KeyError, TypeError, ValueError) as error:
            raise DamagedStepError(record, "its checksum is wrong") from error
        for name, digest in files.items():
            # Later steps remove what none after them needs.
            if (self.folder / name).is_file() and file_digest(self.folder / name) != digest:
                raise DamagedStepError(self.folder / name, "its checksum is wrong")
        return given

    def finish(self, step: str, given: Any, files: Iterable[Path] = ()) -> None:
        """Record what a step gave, as JSON, once the ``files`` that it wrote are on disk. What holds numbers that are not
        finite is not recorded, and made again."""
        if self.lasting:
            files = list(files)
            try:
                json.dumps(given, allow_nan=False)
            except ValueError:
                return
            for file in files:
                sync(file)
            content = {"checksum": "", "files": {file.name: file_digest(file) for file in files}, "given": given}
            with whole_file(self.folder / f"{step}.json") as file:
                file.write_text(sealed(json.dumps(content)), encoding="utf-8")


@contextmanager
def resumed(target: str | os.PathLike[str], settings: Mapping[str, Any], fresh: bool = False) -> Iterator[Steps]:
    """The steps of the job that writes ``target``, which no other process works on meanwhile.

    They lie in ``.NAME.tnc-work`` beside it, stay there when the block ends by an error or the process is killed, and vanish
    when it ends well. ``settings``: whatever the job's result depends on, as JSON. ``fresh``: forget the steps of earlier runs.

    Raises:
        TensorNetError: the steps found are those of a run with other settings; or another process is at work.
    """
    with locked(target) as path:
        folder = _own(path.parent / f".{path.name}.tnc-work")
        if fresh:
            shutil.rmtree(folder, ignore_errors=True)
        steps, now = Steps(folder), json.loads(json.dumps(dict(settings)))
        folder.mkdir(exist_ok=True)
        then = steps.found(_SETTINGS)
        if then is None:
            for left in folder.iterdir():
                left.unlink()
            steps.finish(_SETTINGS, now)
        elif then != now:
            changed = [name for name in sorted(then.keys() | now.keys()) if then.get(name) != now.get(name)]
            told = "; ".join(_difference(name, then.get(name), now.get(name)) for name in changed)
            raise TensorNetError(
                f"{str(target)!r} was begun by a run with other settings ({told}); give the same again to go on with it, or "
                "start over with fresh=True (--fresh)"
            )
        try:
            yield steps
        except BaseException as error:
            # A refusal without a cause outside, such as a full disk, would come again; so little is worth keeping steps for, as
            # is a beginning without any.
            known = isinstance(error, TensorNetError) and not isinstance(error, DamagedStepError)
            refused = known and error.__cause__ is None
            if refused or len(list(folder.iterdir())) <= 1:
                shutil.rmtree(folder)
            else:
                error.add_note("what was done is kept, and the same run, started again, goes on from it")
            raise
        shutil.rmtree(folder)


def drop_finished(target: str | os.PathLike[str], made: Path) -> None:
    """Remove the steps of a run that was killed after its target stood, which ``made``, a file in it, is younger than."""
    with locked(target) as path:
        folder = _own(path.parent / f".{path.name}.tnc-work")
        ages = [file.stat().st_mtime_ns for file in folder.iterdir()] if folder.is_dir() else []
        if ages and made.is_file() and made.stat().st_mtime_ns > max(ages):
            shutil.rmtree(folder)


def _own(folder: Path) -> Path:
    """A work folder that nobody else has laid for us: it is emptied.

    Raises:
        TensorNetError: it is a link, a file, or another user's.
    """
    if folder.is_symlink() or (folder.exists() and not (folder.is_dir() and folder.stat().st_uid == os.geteuid())):
        raise TensorNetError(f"{str(folder)!r} is no folder that this tool made for you; remove it, or choose another target")
    return folder


def _difference(name: str, then: Any, now: Any) -> str:
    if all(isinstance(value, str) and _HASH.fullmatch(value) for value in (then, now)):
        return f"{name} was another"
    return f"{name} was {_short(then)}, is {_short(now)}"


def _short(value: Any) -> str:
    told = json.dumps(value)
    return told if len(told) <= 60 else f"{told[:57]}..."
