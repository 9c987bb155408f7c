"""Singular values before and after ordering."""

from __future__ import annotations

from collections.abc import Sequence

from tensornet_compress.report.charts.lines import spectrum_chart
from tensornet_compress.report.groups import Group
from tensornet_compress.report.numbers import number, short
from tensornet_compress.report.parts import Block, Cell, Section, Table, Text
from tensornet_compress.report.schema import Result, Spectrum

_MOST, _MOST_VALUES = 6, 12


def spectra(result: Result, found: Sequence[Group]) -> Section | None:
    """A chart for each spectrum."""
    known = [(group, spectrum) for group in found for row in group.rows for spectrum in row.spectra if _any(spectrum)]
    if not known:
        return None
    blocks: list[Block] = []
    for group, spectrum in known[:_MOST]:
        blocks.append(spectrum_chart(spectrum, group.subject))
        blocks.append(_table(spectrum))
    if len(known) > _MOST:
        blocks.append(Text(f"{len(known) - _MOST} more spectra are in the JSON file."))
    lead = (
        "A tensor cut in two has as many singular values as are drawn here; the cut keeps those it needs and drops the "
        "rest. When a "
        "better order makes them fall sooner, fewer have to be kept. Where both lines agree, ordering does not help."
    )
    return Section("spectra", "Before and after ordering", lead, tuple(blocks))


def _any(spectrum: Spectrum) -> bool:
    return bool(spectrum.before or spectrum.after)


def _table(spectrum: Spectrum) -> Table:
    sides = (spectrum.before, spectrum.after)
    count = min(_MOST_VALUES, max(map(len, sides)))
    rows = []
    for place in range(count):
        values = (Cell(number(side[place], 3) if place < len(side) else "", True) for side in sides)
        rows.append((Cell(str(place + 1), True), *values))
    title = f"First {count} values, {short(spectrum.title)}"
    return Table(title, (("place", True), ("before", True), ("after", True)), tuple(rows), folded=True)
