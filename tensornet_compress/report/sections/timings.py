"""How long things take."""

from __future__ import annotations

from collections.abc import Sequence

from tensornet_compress.report.charts.axes import direction
from tensornet_compress.report.charts.bars import Bar, bars
from tensornet_compress.report.groups import TASKS, Group, fewer, label, usable
from tensornet_compress.report.headline import featured
from tensornet_compress.report.numbers import heading, plain
from tensornet_compress.report.parts import Block, Chart, Section, Text
from tensornet_compress.report.schema import Result

_MOST_BARS, _MOST_SUBJECTS, _MOST_CHARTS, _MANY = 16, 24, 8, 4


def timings(result: Result, found: Sequence[Group]) -> Section | None:
    """Bars for each time measure of each subject, or where there are many subjects, one bar for each."""
    charts: list[Chart] = []
    for task in ("speed", "weights", "kv", "search"):
        mine = [group for group in found if group.task == task]
        charts += _over_subjects(mine) if len(mine) > _MANY else [chart for group in mine for chart in _of_group(group)]
    if not charts:
        return None
    blocks: list[Block] = [*charts[:_MOST_CHARTS]]
    if len(charts) > _MOST_CHARTS:
        blocks.append(Text(f"{len(charts) - _MOST_CHARTS} more times are in the table of all figures."))
    machine = result.machine
    threads = f"{machine.threads} thread{'s' if machine.threads != 1 else ''}"
    lead = (
        f"Measured on {machine.cores} cores ({plain(machine.processor)}, {plain(machine.device)}) with {threads}. Times "
        f"on another "
        "machine differ; ratios between methods differ less."
    )
    return Section("timings", "How long it takes", lead, tuple(blocks))


def _of_group(group: Group) -> list[Chart]:
    made = []
    first = featured(group)
    budget = first.budget if first is not None else None
    for name in group.times:
        rows = [row for row in group.rivals if usable(row, name) and row.values[name] >= 0]
        if any(row.values[name] for row in rows):
            items = [Bar(label(row), row.values[name], row.ours) for row in fewer(rows, _MOST_BARS, budget)]
            made.append(bars(_title(group, name, f"{TASKS[group.task]}, {plain(group.subject)}"), group.measures[name], items))
    return made


def _over_subjects(many: Sequence[Group]) -> list[Chart]:
    """One chart for each measure, with the time of ours on each subject."""
    made = []
    for name in dict.fromkeys(name for group in many for name in group.times):
        rows = [(group, row) for group in many for row in group.ours[:1] if usable(row, name) and row.values[name] >= 0]
        if any(row.values[name] for _, row in rows):
            items = [Bar(group.subject, row.values[name], True) for group, row in rows[:_MOST_SUBJECTS]]
            made.append(bars(_title(rows[0][0], name, f"{TASKS[many[0].task]}, ours"), rows[0][0].measures[name], items))
    return made


def _title(group: Group, name: str, of: str) -> str:
    better = direction(group.measures[name])
    return f"{heading(group.measures[name])}{f' ({better})' if better else ''}: {of}"
