"""Pareto fronts: quality against size."""

from __future__ import annotations

from collections.abc import Sequence

from tensornet_compress.report.charts.bars import Bar, bars
from tensornet_compress.report.charts.fronts import front_chart
from tensornet_compress.report.groups import Group, usable
from tensornet_compress.report.numbers import heading, number, plain
from tensornet_compress.report.parts import Block, Chart, Section, Text
from tensornet_compress.report.schema import Result

_MOST_GROUPS, _MOST_QUALITIES = 6, 2
_LINE = 3
"""So many sizes make a line; of a search at fewer, the bytes are drawn as bars."""


def fronts(result: Result, found: Sequence[Group]) -> Section | None:
    """A chart for each subject and each of its first qualities; for a search at one or two errors, one for each error."""
    blocks: list[Block] = []
    shown = 0
    for group in found:
        if group.task == "search" and len({row.budget for row in group.rows}) < _LINE and group.size is not None:
            made = _at_equal_error(group, group.size)
        else:
            charts = [front_chart(group, quality) for quality in group.qualities[:_MOST_QUALITIES]]
            made = [chart for chart in charts if chart is not None]
        if made and shown < _MOST_GROUPS:
            blocks += made
        shown += bool(made)
    if not blocks:
        return None
    if shown > _MOST_GROUPS:
        blocks.append(Text(f"{shown - _MOST_GROUPS} more subjects are in the table of all figures."))
    lead = (
        "Every mark is one run. To the left it takes fewer bytes; a line that stays on the better side of another wins at "
        "every size. "
        "The dotted steps join the best of all methods at each size. Ours is drawn thick."
    )
    return Section("fronts", "Quality against size", lead, tuple(blocks))


def _at_equal_error(group: Group, size: str) -> list[Chart]:
    """Bars of bytes, the fewest first, for each error that was allowed."""
    made = []
    for budget in dict.fromkeys(row.budget for row in group.rows if row.budget is not None):
        rows = sorted(
            (row for row in group.rows if row.budget == budget and usable(row, size)), key=lambda row: row.values[size]
        )
        if len(rows) > 1:
            title = (
                f"{heading(group.measures[size])} at an error of {number(budget, 3)} (lower is better): {plain(group.subject)}"
            )
            made.append(bars(title, group.measures[size], [Bar(row.method, row.values[size], row.ours) for row in rows]))
    return made
