"""Where the bytes are."""

from __future__ import annotations

from collections.abc import Sequence

from tensornet_compress.report.charts.bars import stacked
from tensornet_compress.report.groups import TASKS, Group, fewer, label
from tensornet_compress.report.headline import featured
from tensornet_compress.report.numbers import amount, plain, short
from tensornet_compress.report.parts import Block, Cell, Section, Table, Text
from tensornet_compress.report.schema import Result, Row

_MOST_ROWS = 10
_DWARFS = 0.9


def ledger(result: Result, found: Sequence[Group]) -> Section | None:
    """Stacked bars of the ledgers of each subject, and the numbers."""
    blocks: list[Block] = []
    for group in found:
        rows = [row for row in group.rivals if sum(row.ledger.values())]
        if rows:
            title = f"{TASKS[group.task]}: {plain(group.subject)}"
            first = featured(group)
            chosen = fewer(rows, _MOST_ROWS, first.budget if first is not None else None)
            shown = {label(row): row.ledger for row in chosen}
            same = _dominating(list(shown.values()))
            if same is not None:
                shown = {name: {p: size for p, size in ledger.items() if p != same} for name, ledger in shown.items()}
            blocks.append(stacked(title, shown))
            if same is not None:
                size = amount(max(row.ledger[same] for row in chosen))
                blocks.append(Text(f"Left out of the bars because it is most of every one: {plain(same)}, {size}."))
            blocks.append(_table(title, rows))
    if not blocks:
        return None
    lead = "Every stored byte belongs to one part; the parts add up to the whole."
    return Section("ledger", "Where the bytes are", lead, tuple(blocks))


def _dominating(ledgers: Sequence[dict[str, int]]) -> str | None:
    """A part that every ledger holds in about the same size and that dwarfs all others."""
    for part in ledgers[0]:
        sizes = [ledger.get(part, 0) for ledger in ledgers]
        shares = [size / sum(ledger.values()) for size, ledger in zip(sizes, ledgers)]
        if min(shares) > _DWARFS and max(shares) < 1 and max(sizes) <= 1.01 * min(sizes):
            return part
    return None


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
