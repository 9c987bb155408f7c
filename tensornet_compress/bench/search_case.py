"""What a search method is given and what it gives back."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from tensornet_compress.bench.registry import Method, Registry
from tensornet_compress.report import Drawing, Spectrum


@dataclass(frozen=True)
class SearchCase:
    """One fp32 tensor. ``seconds``: what a search with a time budget may take."""

    tensor: Tensor
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


SEARCH_METHODS: Registry[Method[SearchCase, Stored]] = Registry("search method")
"""The size asked for is the relative error to keep, in the fewest bytes."""
