"""The sections of a report: one small file each, a function from the groups of a result to a section, or to nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tensornet_compress.report import Result
from tensornet_compress.report.groups import Group
from tensornet_compress.report.parts import Section
from tensornet_compress.report.sections.cache import cache
from tensornet_compress.report.sections.compare import compare
from tensornet_compress.report.sections.figures import figures
from tensornet_compress.report.sections.fronts import fronts
from tensornet_compress.report.sections.layers import layers
from tensornet_compress.report.sections.ledger import ledger
from tensornet_compress.report.sections.networks import networks
from tensornet_compress.report.sections.reproduce import reproduce
from tensornet_compress.report.sections.skipped import skipped
from tensornet_compress.report.sections.spectra import spectra
from tensornet_compress.report.sections.timings import timings
from tensornet_compress.report.sections.words import words

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
