"""What became of each layer."""

from __future__ import annotations

from collections.abc import Sequence

from tensornet_compress.report.groups import Group, label
from tensornet_compress.report.headline import featured
from tensornet_compress.report.heat import describe, grid_of, maps
from tensornet_compress.report.numbers import amount, number, short, significant
from tensornet_compress.report.parts import Block, Cell, Section, Table, Text
from tensornet_compress.report.schema import LayerCell, Result, Row

_MOST_ROWS, _MOST_LINES = 3, 60


def layers(result: Result, found: Sequence[Group]) -> Section | None:
    """Heat maps of one row for each subject: the one that the headline speaks of, if its layers are known."""
    chosen = [(group, row) for group in found if (row := _chosen(group)) is not None]
    if not chosen:
        return None
    blocks: list[Block] = []
    for group, row in chosen[:_MOST_ROWS]:
        blocks.append(Text(f"{short(group.subject)}: {short(label(row))}", level=3))
        if row.note:
            blocks.append(Text(row.note))
        grid, rest = grid_of(row.layers)
        if not any(cell.ranks for cell in row.layers):
            blocks.append(Text("Every layer stayed one core, the dense tensor in its number format."))
        if len(grid) >= 4:
            blocks += maps(grid)
        else:
            rest = list(row.layers)
        if rest:
            blocks.append(_list(rest, folded=len(grid) >= 4))
    others = sum(1 for row in result.rows if row.layers) - len(chosen[:_MOST_ROWS])
    if others:
        blocks.append(Text(f"The layers of {others} other rows are in the JSON file."))
    lead = (
        "Numbers run along the model from its first block to its last; each cell is one layer. Budgets are spent where "
        "they help most, "
        "so layers differ: sensitive ones keep more bits. Hold the pointer over a cell for everything about it."
    )
    return Section("layers", "What became of each layer", lead, tuple(blocks))


def _chosen(group: Group) -> Row | None:
    row = featured(group)
    if row is not None and row.layers:
        return row
    return next((other for other in group.rivals if other.layers), None)


def _list(rest: Sequence[LayerCell], folded: bool) -> Table:
    shown = sorted(rest, key=lambda cell: (-cell.nbytes, cell.name))[:_MOST_LINES]
    rows = tuple(
        (
            Cell(short(cell.name), exact=describe(cell)),
            Cell(short(f"{cell.family} {', '.join(map(str, cell.ranks))}".strip(), 28)),
            Cell(short(cell.formats, 20)),
            Cell(significant(cell.bits_per_weight), True),
            Cell(amount(cell.nbytes), True, f"{cell.nbytes:,}"),
            Cell("" if cell.error is None else number(cell.error, 3), True),
        )
        for cell in shown
    )
    columns = (
        ("layer", False),
        ("form, ranks", False),
        ("format", False),
        ("bits/weight", True),
        ("size", True),
        ("error", True),
    )
    left = len(rest) - len(shown)
    note = f"The {left} smallest are left out." if left else ""
    return Table("Layers outside the blocks" if folded else "Layers", columns, rows, folded=folded, note=note)
