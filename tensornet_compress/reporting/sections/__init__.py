"""The sections of a report: one small file each, a function from the groups of a result to a section, or to nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tensornet_compress.reporting.parts import Section
from tensornet_compress.reporting.roles import Group
from tensornet_compress.reporting.sections.cache import cache
from tensornet_compress.reporting.sections.compare import compare
from tensornet_compress.reporting.sections.figures import figures
from tensornet_compress.reporting.sections.fronts import fronts
from tensornet_compress.reporting.sections.layers import layers
from tensornet_compress.reporting.sections.ledger import ledger
from tensornet_compress.reporting.sections.networks import networks
from tensornet_compress.reporting.sections.reproduce import reproduce
from tensornet_compress.reporting.sections.skipped import skipped
from tensornet_compress.reporting.sections.spectra import spectra
from tensornet_compress.reporting.sections.timings import timings
from tensornet_compress.reporting.sections.words import words
from tensornet_compress.results import Result

Maker = Callable[[Result, Sequence[Group]], Section | None]
SECTIONS: tuple[Maker, ...] = (
    compare,
    fronts,
    layers,
    ledger,
    spectra,
    networks,
    cache,
    timings,
    skipped,
    figures,
    words,
    reproduce,
)

__all__ = ["SECTIONS", "Maker"]
