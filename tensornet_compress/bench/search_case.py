"""What a search method is given and what it gives back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from tensornet_compress.bench.registry import Registry
from tensornet_compress.report import Drawing, Spectrum


@dataclass(frozen=True)
class SearchCase:
    """One fp32 tensor and the relative error to keep. ``seconds``: what a search with a time budget may take."""

    tensor: Tensor
    max_error: float
    seconds: float
    seed: int = 0


@dataclass(frozen=True)
class Stored:
    """What a method stores. ``error``: measured relative error, ``None`` where the bytes are only predicted."""

    nbytes: int
    error: float | None
    note: str = ""
    values: dict[str, float] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    drawings: tuple[Drawing, ...] = ()
    spectra: tuple[Spectrum, ...] = ()


@dataclass(frozen=True)
class SearchMethod:
    """``run``: the fewest bytes that keep the error; raises ``Unavailable`` when it cannot."""

    name: str
    run: Callable[[SearchCase], Stored]
    ours: bool = False
    explanation: str = ""


SEARCH_METHODS: Registry[SearchMethod] = Registry("search method")
