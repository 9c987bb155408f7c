"""The section of layers: heat maps of a model's blocks by kinds of layer, and a table of the layers outside them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from math import isfinite, log10

from tensornet_compress.report.page.groups import Group, label
from tensornet_compress.report.page.headline import featured
from tensornet_compress.report.page.numbers import amount, number, short, significant
from tensornet_compress.report.page.parts import Block, Cell, HeatTable, Key, Section, Table, Text
from tensornet_compress.report.schema import LayerCell, Result, Row

_STEPS = 7
_FAMILIES = 6
_LEAST_GRID = 4
_MOST_ROWS, _MOST_LINES = 3, 60
_BLOCK = re.compile(r"^(?:.*?\.)??(\d+)\.(.+)$")
_GROUPED = re.compile(r"g\d+[a-z]*$")
Grid = dict[tuple[int, str], LayerCell]


def layers(result: Result, groups: Sequence[Group]) -> Section | None:
    """Heat maps of one row for each subject: the one that the headline speaks of, if its layers are known."""
    chosen = [(group, row) for group in groups if (row := _chosen(group)) is not None]
    if not chosen:
        return None
    blocks: list[Block] = []
    for group, row in chosen[:_MOST_ROWS]:
        blocks.append(Text(f"{short(group.subject)}: {short(label(row))}", level=3))
        blocks += [Text(row.note)] if row.note else []
        if not any(cell.ranks for cell in row.layers):
            blocks.append(Text("Every layer stayed one core, the dense tensor in its number format."))
        grid, rest = _grid_of(row.layers)
        large = len(grid) >= _LEAST_GRID
        blocks += _maps(grid) if large else []
        if rest or not large:
            blocks.append(_list(rest if large else row.layers, folded=large))
    others = sum(1 for row in result.rows if row.layers) - len(chosen[:_MOST_ROWS])
    blocks += [Text(f"The layers of {others} other rows are in the JSON file.")] if others else []
    return Section("layers", tuple(blocks))


def _chosen(group: Group) -> Row | None:
    row = featured(group)
    return row if row is not None and row.layers else next((other for other in group.rivals if other.layers), None)


def _grid_of(layers: Sequence[LayerCell]) -> tuple[Grid, list[LayerCell]]:
    """Layers by (block, kind), and those that are in no block."""
    grid: Grid = {}
    rest: list[LayerCell] = []
    for layer in layers:
        match = _BLOCK.match(layer.name)
        key = (int(match[1]), match[2]) if match else None
        if key is None or key in grid:
            rest.append(layer)
        else:
            grid[key] = layer
    return grid, rest


def _maps(grid: Grid) -> list[HeatTable]:
    """Form and ranks, bits and formats, and error, where there is something to show."""
    cells = list(grid.values())
    made = [_families(grid)] if any(cell.ranks for cell in cells) else []
    made.append(_scaled(grid, "Bits per weight, with the number format", lambda cell: cell.bits_per_weight, _bits_text))
    if any(cell.error is not None for cell in cells):
        made.append(_scaled(grid, "Relative error of each layer", lambda cell: cell.error, _error_text, log=True))
    return made


def _families(grid: Grid) -> HeatTable:
    count = Counter(cell.family for cell in grid.values())
    names = sorted(count, key=lambda name: (-count[name], name))
    tones = {name: f"f{min(place, _FAMILIES - 1)}" for place, name in enumerate(names)}

    def cell_of(cell: LayerCell) -> Cell:
        return Cell(str(max(cell.ranks)) if cell.ranks else "–", True, _describe(cell), tones[cell.family])

    shown = [*names[: _FAMILIES - 1], *(["other forms"] if len(names) > _FAMILIES else names[_FAMILIES - 1 :])]
    legend = tuple(Key("■", f"f{place}", short(name)) for place, name in enumerate(shown))
    note = "The number is the largest rank of the layer's network; a dash is a layer that stayed one dense core."
    return _table(grid, "Form and rank of each layer", cell_of, legend, note)


def _scaled(
    grid: Grid, caption: str, value: Callable[[LayerCell], float | None], text: Callable[[LayerCell], str], log: bool = False
) -> HeatTable:
    """A map in seven steps from the least to the largest value, logarithmic if asked for and worth it."""
    known = [v for v in map(value, grid.values()) if v is not None and isfinite(v)]
    positive = [v for v in known if v > 0]
    log = log and bool(positive) and max(positive) > 10 * min(positive)
    low, high = (min(positive), max(positive)) if log else (min(known, default=0.0), max(known, default=1.0))

    def tone(v: float | None) -> str:
        if v is None or not isfinite(v):
            return "none"
        if high <= low or v <= low:
            return "h0"
        part = log10(v / low) / log10(high / low) if log else (v - low) / (high - low)
        return f"h{min(_STEPS - 1, int(part * _STEPS))}"

    scale = None if high <= low else (significant(low, 2), significant(high, 2))
    legend = (Key("■", "h0", f"{significant(low)} everywhere"),) if scale is None else ()
    return _table(grid, caption, lambda cell: Cell(text(cell), True, _describe(cell), tone(value(cell))), legend, "", scale)


def _table(
    grid: Grid,
    caption: str,
    cell_of: Callable[[LayerCell], Cell],
    legend: tuple[Key, ...],
    note: str,
    scale: tuple[str, str] | None = None,
) -> HeatTable:
    kinds = list(dict.fromkeys(kind for _, kind in grid))
    blocks = sorted({block for block, _ in grid})
    empty = Cell("", tone="none")
    cells = tuple(tuple(cell_of(grid[at]) if (at := (block, kind)) in grid else empty for block in blocks) for kind in kinds)
    # The last part of a name, where that is enough to tell the kinds apart.
    last = [kind.rsplit(".", 1)[-1] for kind in kinds]
    names = tuple(short(end if last.count(end) == 1 else kind, 22) for end, kind in zip(last, kinds))
    return HeatTable(caption, names, tuple(map(str, blocks)), cells, legend, scale, note)


def _bits_text(cell: LayerCell) -> str:
    """The format without its group size, if it is short enough for a cell: ``int4``."""
    name = _GROUPED.sub("", cell.formats)
    return name if len(name) <= 4 else significant(cell.bits_per_weight, 2)


def _error_text(cell: LayerCell) -> str:
    if cell.error is None or not isfinite(cell.error):
        return ""
    if cell.error < 0.0005:
        return "~0"
    return (f"{cell.error:.3f}" if cell.error < 0.0095 else f"{cell.error:.2f}").removeprefix("0")


def _describe(cell: LayerCell) -> str:
    """Everything about a layer, for its tooltip."""
    ranks = f", ranks {', '.join(map(str, cell.ranks))}" if cell.ranks else ""
    error = "" if cell.error is None else f", error {number(cell.error, 3)}"
    bits = f"{significant(cell.bits_per_weight)} bits per weight, {amount(cell.nbytes)}"
    return f"{cell.name}: {cell.family}{ranks}, {cell.formats}, {bits}{error}"


def _list(rest: Sequence[LayerCell], folded: bool) -> Table:
    """The largest layers, one a line."""
    shown = sorted(rest, key=lambda cell: (-cell.nbytes, cell.name))[:_MOST_LINES]
    rows = tuple(
        (
            Cell(short(cell.name), exact=_describe(cell)),
            Cell(short(f"{cell.family} {', '.join(map(str, cell.ranks))}".strip(), 28)),
            Cell(short(cell.formats, 20)),
            Cell(significant(cell.bits_per_weight), True),
            Cell(amount(cell.nbytes), True, f"{cell.nbytes:,}"),
            Cell("" if cell.error is None else number(cell.error, 3), True),
        )
        for cell in shown
    )
    columns = ("layer", "form, ranks", "format", "bits/weight", "size", "error")
    note = f"The {len(rest) - len(shown)} smallest are left out." if len(rest) > len(shown) else ""
    return Table("Layers outside the blocks" if folded else "Layers", columns, rows, folded=folded, note=note)
