"""Every measured figure as a table."""

from __future__ import annotations

from collections.abc import Sequence

from tensornet_compress.report.charts.axes import named
from tensornet_compress.report.groups import TASKS, Group, label
from tensornet_compress.report.numbers import amount, is_bytes, number, plain, short
from tensornet_compress.report.parts import Cell, Section, Table
from tensornet_compress.report.schema import Measure, Result, Row

_OPEN = 12


def figures(result: Result, found: Sequence[Group]) -> Section | None:
    """A table for each subject."""
    if not found:
        return None
    few = sum(len(group.rows) for group in found) <= _OPEN
    lead = "Everything that was measured, unrounded where the pointer rests on a number. An empty cell was not measured."
    return Section("figures", "All figures", lead, tuple(_table(group, folded=not few) for group in found))


def _table(group: Group, folded: bool) -> Table:
    columns = (("method", False), *((_column(measure), True) for measure in group.measures.values()))
    rows = []
    for row in sorted(group.rows, key=lambda row: not row.ours):
        name = Cell(
            short(label(row)) + (" (ours)" if row.ours and "ours" not in row.method else ""),
            exact=plain(row.note),
            tone="ours" if row.ours else "",
        )
        rows.append((name, *(_value(row, key, measure) for key, measure in group.measures.items())))
    return Table(f"{TASKS[group.task]}: {short(group.subject)} ({len(rows)} rows)", columns, tuple(rows), folded=folded)


def _column(measure: Measure) -> str:
    return named(measure) + {"lower": " ↓", "higher": " ↑", None: ""}[measure.better]


def _value(row: Row, name: str, measure: Measure) -> Cell:
    if name not in row.values:
        return Cell("", True)
    value = row.values[name]
    exact = f"{int(value):,} bytes" if is_bytes(measure) and abs(value) < 1e18 else repr(value)
    return Cell(amount(value) if is_bytes(measure) else number(value), True, exact)
