"""Pareto fronts: quality against size."""

from __future__ import annotations

from collections.abc import Sequence

from tensornet_compress.reporting.charts.fronts import front_chart
from tensornet_compress.reporting.parts import Block, Section, Text
from tensornet_compress.reporting.roles import Group
from tensornet_compress.results import Result

_MOST_GROUPS, _MOST_QUALITIES = 6, 2


def fronts(result: Result, found: Sequence[Group]) -> Section | None:
    """A chart for each subject and each of its first qualities."""
    blocks: list[Block] = []
    shown = 0
    for group in found:
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
