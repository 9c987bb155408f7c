"""Bits of a cache over the layers of the model."""

from __future__ import annotations

from collections.abc import Sequence

from tensornet_compress.report.charts.lines import cache_bits_chart
from tensornet_compress.report.groups import Group, label
from tensornet_compress.report.numbers import plain, short, significant
from tensornet_compress.report.parts import Block, Cell, Section, Table, Text
from tensornet_compress.report.schema import Result, Row

_MOST = 4


def cache(result: Result, found: Sequence[Group]) -> Section | None:
    """A chart for each row that knows its bits."""
    known = [(group, row) for group in found for row in group.rivals if row.cache_bits]
    if not known:
        return None
    blocks: list[Block] = []
    for group, row in known[:_MOST]:
        blocks.append(cache_bits_chart(f"{plain(group.subject)}: {plain(label(row))}", row.cache_bits))
        blocks.append(_table(row))
    if len(known) > _MOST:
        blocks.append(Text(f"{len(known) - _MOST} more are in the JSON file."))
    lead = (
        "How the cache's bits are shared out. Layers whose keys or values matter more to the model's answers get more "
        "bits; the "
        "average over all layers is what the budget allows."
    )
    return Section("cache", "Cache bits over the layers", lead, tuple(blocks))


def _table(row: Row) -> Table:
    rows = tuple(
        (Cell(str(layer.layer), True), Cell(significant(layer.keys), True), Cell(significant(layer.values), True))
        for layer in row.cache_bits
    )
    title = f"Bits in numbers, {short(label(row))}"
    return Table(title, (("layer", True), ("keys", True), ("values", True)), rows, folded=True)
