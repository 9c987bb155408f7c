"""Resident memory of this process and of those that it started, as Linux tells it."""

from __future__ import annotations

from pathlib import Path

_PROC = Path("/proc")


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


def _told(process: str, name: str) -> int | None:
    try:
        lines = (_PROC / process / "status").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:")), None)
