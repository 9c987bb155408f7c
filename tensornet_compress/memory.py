"""Resident memory of this process and of those that it started, as Linux tells it; parameters that are mapped from files need
memory only while they are used."""

from __future__ import annotations

import ctypes
import mmap
import sys
from io import FileIO
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

_PROC = Path("/proc")
_PAGES = _PROC / "self/pagemap"


def resident_bytes() -> int | None:
    """What this process holds now; None where the system does not tell."""
    return _told("self", "VmRSS")


def peak_bytes() -> int | None:
    """The most that this process ever held; None where the system does not tell."""
    return _told("self", "VmHWM")


def peak_of_all() -> int | None:
    """The sum of the most that this process and each of its living children ever held."""
    own = peak_bytes()
    if own is None:
        return None
    children = [child for list_ in _PROC.glob("self/task/*/children") for child in list_.read_text(encoding="ascii").split()]
    return own + sum(_told(child, "VmHWM") or 0 for child in children)


def release(held: nn.Module | Tensor) -> int:
    """Give back the memory of a tensor, or of those parameters of a module, that were mapped from files and never changed
    since: they are read again when next used. All others stay as they are, everywhere but on Linux all do.

    Returns the bytes that were let go.
    """
    try:
        pages = _PAGES.open("rb", buffering=0)
    except OSError:
        return 0
    advise, released = ctypes.CDLL(None).madvise, 0
    with pages:
        for tensor in held.parameters() if isinstance(held, nn.Module) else [held]:
            if tensor.device.type != "cpu" or tensor.layout is not torch.strided or not tensor.is_contiguous():
                continue
            start, end = tensor.data_ptr(), tensor.data_ptr() + tensor.numel() * tensor.element_size()
            # Whole pages only: what lies beside may be in use.
            first, last = -(-start // mmap.PAGESIZE), end // mmap.PAGESIZE
            if last <= first or not _unchanged(pages, first, last):
                continue
            size = (last - first) * mmap.PAGESIZE
            if advise(ctypes.c_void_p(first * mmap.PAGESIZE), ctypes.c_size_t(size), mmap.MADV_DONTNEED) == 0:
                released += size
    return released


def trim() -> None:
    """Give back what the C library keeps of memory that was freed, on Linux, where it knows how (glibc does)."""
    if sys.platform == "linux" and (give_back := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        give_back(0)


def _unchanged(pages: FileIO, first: int, last: int) -> bool:
    """Whether all pages that are in memory, some at least, are those of a file: one that was written to exists in memory alone.

    The kernel keeps eight bytes for each page: its highest bits say that it is in memory, that it is swapped out, and that it
    belongs to a file (https://docs.kernel.org/admin-guide/mm/pagemap.html).
    """
    pages.seek(8 * first)
    entries = np.frombuffer(pages.read(8 * (last - first)), np.uint64)
    present = entries >> np.uint64(62) > 0
    filed = (entries >> np.uint64(61)) & np.uint64(1) > 0
    return bool(len(entries) == last - first and present.any() and filed[present].all())


def _told(process: str, name: str) -> int | None:
    try:
        lines = (_PROC / process / "status").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:")), None)
