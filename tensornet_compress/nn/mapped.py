"""Parameters that are mapped from files need memory only while they are used."""

from __future__ import annotations

import ctypes
import mmap
from bisect import bisect_right
from pathlib import Path

import torch
from torch import Tensor, nn

_MAPS = Path("/proc/self/smaps")


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
