"""Results and comparisons as tables on the terminal."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich.console import Group
from rich.table import Table

from tensornet_compress.report import Result, Row

if TYPE_CHECKING:
    from tensornet_compress.bench.compare import Comparison


def result_tables(result: Result) -> Iterator[Table]:
    """One table for each task; a skipped row shows its reason."""
    for task in dict.fromkeys(row.task for row in result.rows):
        rows = [row for row in result.rows if row.task == task]
        names = [name for name in result.measures if any(name in row.values for row in rows)]
        table = Table("subject", "method", "asked", title=task)
        for name in names:
            measure = result.measures[name]
            table.add_column(f"{measure.title} ({measure.unit})" if measure.unit else measure.title, justify="right")
        for row in rows:
            table.add_row(*_head(row), *_values(row, names))
        yield table


def comparison_table(comparison: Comparison) -> Group:
    """Old, new and ratio of every value, then what differs in the settings."""
    table = Table("row", "value", "old", "new", "new / old", title="against the older result")
    for change in comparison.changes:
        mark = "" if change.better is None else " better" if change.better else " worse"
        table.add_row(change.row, change.value, _number(change.old), _number(change.new), f"{change.ratio:.3f}{mark}")
    return Group(table, *(f"note: {note}" for note in comparison.notes))


def _head(row: Row) -> tuple[str, str, str]:
    return (
        row.subject,
        f"[bold]{row.method}[/bold]" if row.ours else row.method,
        "" if row.budget is None else f"{row.budget:g}",
    )


def _values(row: Row, names: list[str]) -> list[str]:
    if row.skipped is not None:
        return [f"skipped: {row.skipped}", *[""] * (len(names) - 1)]
    return [_number(row.values[name]) if name in row.values else "-" for name in names]


def _number(value: float) -> str:
    return f"{value:,.0f}" if value == int(value) and abs(value) >= 1000 else f"{value:.4g}"
