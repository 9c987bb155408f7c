"""Resident memory of this process and of those that it started, as Linux tells it; parameters that are mapped from files need
memory only while they are used."""

from __future__ import annotations

import ctypes
import mmap
from bisect import bisect_right
from pathlib import Path

import torch
from torch import Tensor, nn

_PROC = Path("/proc")
_MAPS = _PROC / "self/smaps"


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
    spans = []
    for tensor in held.parameters() if isinstance(held, nn.Module) else [held]:
        if tensor.device.type == "cpu" and tensor.layout is torch.strided and tensor.is_contiguous():
            start = tensor.data_ptr()
            spans.append((start, start + tensor.numel() * tensor.element_size()))
    if not spans or not _MAPS.exists():
        return 0
    files = _unchanged_files()
    starts = [start for start, _ in files]
    advise = ctypes.CDLL(None).madvise
    released = 0
    for start, end in spans:
        number = bisect_right(starts, start) - 1
        if number < 0 or end > files[number][1]:
            continue
        # Whole pages only: what lies beside may be in use.
        first, last = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE, end // mmap.PAGESIZE * mmap.PAGESIZE
        if last > first and advise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), mmap.MADV_DONTNEED) == 0:
            released += last - first
    return released


def _told(process: str, name: str) -> int | None:
    try:
        lines = (_PROC / process / "status").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:")), None)


def _unchanged_files() -> list[tuple[int, int]]:
    """Where safetensors files are mapped of which no page was written to: a written page exists in memory alone."""
    found: list[tuple[int, int]] = []
    place: tuple[int, int] | None = None
    with _MAPS.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            head, _, rest = line.partition(" ")
            if not head.endswith(":"):
                start, end = (int(part, 16) for part in head.split("-"))
                place = (start, end) if rest.rstrip().endswith(".safetensors") else None
            elif head == "Anonymous:" and place is not None and rest.split()[0] == "0":
                found.append(place)
    return found
