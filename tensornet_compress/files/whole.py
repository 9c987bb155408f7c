"""The one door for writing: files and folders that appear whole or not at all, synced to disk, by one writer at a time.

A target is locked while it is written (``.NAME.tnc-lock`` beside it), its content is made under a temporary name
(``.NAME.tnc-RANDOM``), synced, and then put in its place in one step. What a killed process left behind is swept by the next
one that locks the same target.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import os
import re
import secrets
import shutil
import stat
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import get_ident

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from tensornet_compress.errors import CheckpointError, TensorNetError
from tensornet_compress.files.hashes import HASHES, digests, header_digest, refuse_nan

_EXCHANGE, _HERE = 2, -100  # RENAME_EXCHANGE and AT_FDCWD of renameat2(2)
_RANDOM = re.compile("[0-9a-f]{8}")
_held: dict[Path, int] = {}
"""Targets that this process has locked -> the thread that did."""


@contextmanager
def locked(target: str | os.PathLike[str], wait: bool = False) -> Iterator[Path]:
    """Nobody else writes ``target`` inside this block; gives its real path. What a killed writer left is cleaned first.

    A thread may lock a target again that it holds. ``wait``: until another writer has finished.

    Raises:
        TensorNetError: another writer is at work; the message holds its process id.
    """
    path = Path(os.path.realpath(target))
    if path in _held:
        if _held[path] != get_ident():
            raise TensorNetError(f"{str(target)!r} is being written by another thread of this process ({os.getpid()})")
        yield path
        return
    made = [folder for folder in path.parents if not folder.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = _beside(path, "lock")
    handle = _taken(path, lock, wait)
    _held[path] = get_ident()
    try:
        _recover(path)
        beginning = f".{path.name}.tnc-"
        # Folders of thousands of files are gone through once for each file: names first.
        for name in os.listdir(path.parent):
            if name.startswith(beginning) and _RANDOM.fullmatch(name, len(beginning)):
                _remove(path.parent / name)
        yield path
    finally:
        _held.pop(path, None)
        lock.unlink(missing_ok=True)
        os.close(handle)
        with suppress(OSError):  # folders that were made for nothing go again, others are not empty
            for folder in made:
                folder.rmdir()


@contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """An empty temporary file beside ``path`` that takes its place when the block ends well, and vanishes otherwise.

    Folders above ``path`` are made.

    Raises:
        TensorNetError: ``path`` is a folder or a device, or another process is writing it.
    """
    check_file(path)
    with locked(path) as target:
        temporary = _beside(target)
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        try:
            mode = stat.S_IMODE(temporary.stat().st_mode)  # as the user's umask has it
            yield temporary
            temporary.chmod(mode)
            sync(temporary)
            os.replace(temporary, target)
            sync(target.parent)
        except OSError as error:
            raise _told(error, path) from error
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def whole_folder(target: str | os.PathLike[str], ours: Collection[str] = ()) -> Iterator[Path]:
    """A temporary folder beside ``target`` that takes its place when the block ends well, and vanishes otherwise.

    An old folder is exchanged for the new one in one step. What it held stays, but for the names in ``ours`` and those that the
    new folder has too.
    """
    with locked(target) as path:
        temporary = _beside(path)
        temporary.mkdir()
        try:
            mode = stat.S_IMODE(temporary.stat().st_mode)  # as the user's umask has it
            yield temporary
            _settle(temporary, mode)
            if path.exists():
                _carry_over(path, temporary, ours)
                temporary.chmod(stat.S_IMODE(path.stat().st_mode))
                sync(temporary)
                _exchange(temporary, path)
            else:
                os.rename(temporary, path)
            sync(path.parent)
        except OSError as error:
            raise _told(error, target) from error
        finally:
            _remove(temporary)


def _told(error: OSError, target: str | os.PathLike[str]) -> OSError:
    """An error of writing that names what was to be written."""
    return error if error.filename or error.errno is None else OSError(error.errno, error.strerror, str(target))


def recovered(folder: Path) -> Path:
    """``folder``, put back in its place first if its writer was killed between taking the old one away and giving the new."""
    target = Path(os.path.realpath(folder))
    if not target.exists() and _beside(target, "old").exists():
        with locked(target, wait=True):
            pass
    return folder


def check_file(path: str | os.PathLike[str], option: str = "") -> None:
    """Refuse a path that no file can be written to, before the work whose result it is to take.

    Raises:
        TensorNetError: it is a folder or a device, or what is above it cannot be written to; ``option`` is named.
    """
    target, told = Path(os.path.realpath(path)), f"{option} {str(path)!r}".strip()
    if target.is_dir():
        raise TensorNetError(f"{told} is a folder; give a file name")
    if target.exists() and not target.is_file():
        raise TensorNetError(f"{told} is no regular file; give the name of one")
    _check_parent(target, told)


def check_folder(path: str | os.PathLike[str], nbytes: int = 0) -> None:
    """Refuse a path that no folder of ``nbytes`` can be written to, before the work whose result it is to take.

    Raises:
        TensorNetError: it is a file, what is above it cannot be written to, or the disk has too little room.
    """
    target, told = Path(os.path.realpath(path)), repr(str(path))
    if target.exists() and not target.is_dir():
        raise CheckpointError(f"{told} is a file, a folder is needed")
    parent = _check_parent(target, told)
    if (free := shutil.disk_usage(parent).free) < nbytes:
        raise TensorNetError(f"{told} needs about {nbytes:,} bytes, the disk has {free:,} left; make room there")


def _check_parent(target: Path, told: str) -> Path:
    """The nearest folder above a target that exists."""
    parent = next((folder for folder in target.parents if folder.exists() or folder.is_symlink()), None)
    if parent is None:
        raise TensorNetError(f"{told} is the root of the file system; give a place below it")
    if not parent.is_dir():
        raise TensorNetError(f"{told} lies below {str(parent)!r}, which is no folder")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise TensorNetError(f"{told} cannot be written: {str(parent)!r} is read-only; choose another place")
    return parent


def write_tensors(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], header: Mapping[str, str], hashed: bool = True
) -> int:
    """Write a safetensors file, whole or not at all; returns its bytes. Tensors may share memory, and are stored apart.

    ``hashed``: with the hashes of all tensors and of the header in the header; a manifest beside it may have them instead.

    Raises:
        TensorNetError: a tensor holds NaN, or the file cannot be written (a full disk).
    """
    plain: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        part = tensor.detach().cpu().contiguous()
        refuse_nan(name, part)
        plain[name] = part.clone() if part.untyped_storage().data_ptr() in storages else part
        storages.add(plain[name].untyped_storage().data_ptr())
    texts = dict(header)
    if hashed:
        texts[HASHES] = json.dumps({"header": header_digest(texts), "tensors": digests(plain)})
    with whole_file(path) as file:
        # In a folder of its own: safetensors makes a temporary file beside, which a killed process would leave behind.
        hall = _beside(Path(path))
        hall.mkdir()
        try:
            save_file(plain, hall / "tensors", texts or None)
            _order_header(hall / "tensors")
            os.replace(hall / "tensors", file)
        except SafetensorError as error:
            raise TensorNetError(f"{str(path)!r} cannot be written: {error}") from error
        finally:
            shutil.rmtree(hall, ignore_errors=True)
    return Path(path).stat().st_size


def _order_header(file: Path) -> None:
    """Texts of a safetensors header in the order of their names: safetensors writes them in another order each time."""
    with file.open("r+b") as stored:
        size = int.from_bytes(stored.read(8), "little")
        header = json.loads(stored.read(size))
        texts = header.get("__metadata__", {})
        if len(texts) > 1:
            ordered = header | {"__metadata__": dict(sorted(texts.items()))}
            content = json.dumps(ordered, separators=(",", ":"), ensure_ascii=False).encode()
            if len(content) > size:
                raise TensorNetError(f"the header of {str(file)!r} takes {len(content)} bytes, {size} were written")
            stored.seek(8)
            stored.write(content.ljust(size))


def _beside(target: Path, kind: str | None = None) -> Path:
    return target.parent / f".{target.name}.tnc-{kind or secrets.token_hex(4)}"


def _taken(target: Path, lock: Path, wait: bool) -> int:
    """A handle that holds the lock, released by the system when this process ends, however it ends."""
    while True:
        handle = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            # Its last owner may have removed the file between our opening and locking it.
            if lock.exists() and os.path.samestat(os.fstat(handle), lock.stat()):
                os.ftruncate(handle, 0)
                with suppress(OSError):  # on a full disk; the number is for others to read
                    os.write(handle, str(os.getpid()).encode())
                return handle
        except BlockingIOError:
            owner = os.pread(handle, 20, 0).decode(errors="replace") or "unknown"
            os.close(handle)
            raise TensorNetError(
                f"{str(target)!r} is being written by process {owner}; wait until it has finished, or choose another place"
            ) from None
        os.close(handle)


def _recover(target: Path) -> None:
    """Undo what a writer without exchange had half done."""
    old = _beside(target, "old")
    if old.exists() and not target.exists():
        os.rename(old, target)
    _remove(old)


def _exchange(new: Path, target: Path) -> None:
    """Swap two folders in one step; where the system cannot, in three that ``_recover`` can undo."""
    swap = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if swap is not None and swap(_HERE, os.fsencode(new), _HERE, os.fsencode(target), _EXCHANGE) == 0:
        return
    if swap is not None and ctypes.get_errno() not in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(target))
    old = _beside(target, "old")
    os.rename(target, old)
    os.rename(new, target)
    os.rename(old, new)


def _carry_over(old: Path, new: Path, ours: Collection[str]) -> None:
    for item in old.iterdir():
        there = new / item.name
        if item.name in ours or there.exists():
            continue
        if item.is_dir() and not item.is_symlink():
            shutil.copytree(item, there, symlinks=True, copy_function=_link)
        else:
            _link(item, there)


def _link(source: str | Path, target: str | Path) -> None:
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:  # not every file system has hard links
        shutil.copy2(source, target, follow_symlinks=False)


def _settle(folder: Path, mode: int) -> None:
    """Give all files the mode that a new file would have, and bring everything to disk."""
    for place, _, files in os.walk(folder):
        for name in files:
            (Path(place) / name).chmod(mode & 0o666)
            sync(Path(place) / name)
        sync(Path(place))


def sync(path: Path) -> None:
    """Bring a file or the names in a folder to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
