"""Where the bytes are."""

from __future__ import annotations

from collections.abc import Sequence

from tensornet_compress.reporting.charts.bars import stacked
from tensornet_compress.reporting.numbers import amount, plain, short
from tensornet_compress.reporting.parts import Block, Cell, Section, Table
from tensornet_compress.reporting.roles import TASKS, Group, label
from tensornet_compress.results import Result, Row

_MOST_ROWS = 10


def ledger(result: Result, found: Sequence[Group]) -> Section | None:
    """Stacked bars of the ledgers of each subject, and the numbers."""
    blocks: list[Block] = []
    for group in found:
        rows = [row for row in group.rivals if sum(row.ledger.values())]
        if rows:
            title = f"{TASKS[group.task]}: {plain(group.subject)}"
            blocks.append(stacked(title, {label(row): row.ledger for row in rows[:_MOST_ROWS]}))
            blocks.append(_table(title, rows))
    if not blocks:
        return None
    lead = "Every stored byte belongs to one part; the parts add up to the whole."
    return Section("ledger", "Where the bytes are", lead, tuple(blocks))


def _table(title: str, rows: Sequence[Row]) -> Table:
    cells = []
    for row in rows:
        total = sum(row.ledger.values())
        for part, size in sorted(row.ledger.items(), key=lambda item: (-item[1], item[0])):
            share = f"{size / total:.1%}"
            cells.append((Cell(short(label(row))), Cell(short(part)), Cell(amount(size), True, f"{size:,}"), Cell(share, True)))
        cells.append(
            (Cell(short(label(row))), Cell("all", tone="sum"), Cell(amount(total), True, f"{total:,}"), Cell("100 %", True))
        )
    columns = (("method", False), ("part", False), ("size", True), ("share", True))
    return Table(f"Bytes in numbers, {title}", columns, tuple(cells), folded=True)
