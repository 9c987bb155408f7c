"""What could not run, and why."""

from __future__ import annotations

from collections.abc import Sequence

from tensornet_compress.report.groups import TASKS, Group, label
from tensornet_compress.report.numbers import plain, short
from tensornet_compress.report.parts import Cell, Section, Table
from tensornet_compress.report.schema import Result

_OPEN = 10


def skipped(result: Result, found: Sequence[Group]) -> Section | None:
    """Skipped methods with their reasons."""
    rows = tuple(
        (Cell(short(label(row))), Cell(f"{TASKS[row.task]}: {short(row.subject, 36)}"), Cell(plain(row.skipped)))
        for row in result.rows
        if row.skipped is not None
    )
    if not rows:
        return None
    lead = (
        "A method that is missing above because it could not run is here with its reason; it was neither won nor lost against."
    )
    columns = (("method", False), ("on", False), ("reason", False))
    return Section(
        "skipped", "What could not run", lead, (Table(f"{len(rows)} skipped", columns, rows, folded=len(rows) > _OPEN),)
    )
