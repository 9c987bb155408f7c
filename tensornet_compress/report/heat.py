"""Heat maps of layers as tables: blocks of the model by kinds of layer, with a colour scale of seven steps."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from math import isfinite, log10

from tensornet_compress.report.numbers import amount, number, plain, short, significant
from tensornet_compress.report.parts import Cell, HeatTable, Key
from tensornet_compress.report.schema import LayerCell

STEPS = 7
FAMILIES = 6
_BLOCK = re.compile(r"^(?:.*?\.)??(\d+)\.(.+)$")
_GROUPED = re.compile(r"g\d+[a-z]*$")
Grid = dict[tuple[int, str], LayerCell]


def grid_of(layers: Sequence[LayerCell]) -> tuple[Grid, list[LayerCell]]:
    """Layers by (block, kind), and those that are in no block."""
    found: Grid = {}
    rest: list[LayerCell] = []
    for layer in layers:
        match = _BLOCK.match(layer.name)
        key = (int(match[1]), match[2]) if match else None
        if key is None or key in found:
            rest.append(layer)
        else:
            found[key] = layer
    return found, rest


def maps(grid: Grid) -> list[HeatTable]:
    """Form and ranks, bits and formats, and error, where there is something to show."""
    cells = list(grid.values())
    made = [_families(grid)] if any(cell.ranks for cell in cells) else []
    made.append(_scale(grid, "Bits per weight, with the number format", lambda cell: cell.bits_per_weight, _bits_text))
    if any(cell.error is not None for cell in cells):
        made.append(_scale(grid, "Relative error of each layer", lambda cell: cell.error, _error_text, log=True))
    return made


def describe(cell: LayerCell) -> str:
    """Everything about a layer, for its tooltip."""
    ranks = f", ranks {', '.join(map(str, cell.ranks))}" if cell.ranks else ""
    error = "" if cell.error is None else f", error {number(cell.error, 3)}"
    return plain(
        f"{cell.name}: {cell.family}{ranks}, {cell.formats}, {significant(cell.bits_per_weight)} bits per weight, "
        f"{amount(cell.nbytes)}{error}"
    )


def _families(grid: Grid) -> HeatTable:
    names = sorted({cell.family for cell in grid.values()}, key=lambda name: (-_count(grid, name), name))
    shown = {name: min(place, FAMILIES - 1) for place, name in enumerate(names)}

    def cell_of(cell: LayerCell) -> Cell:
        return Cell(str(max(cell.ranks)) if cell.ranks else "–", True, describe(cell), f"f{shown[cell.family]}")

    legend = [Key("■", f"f{place}", short(name)) for name, place in shown.items() if place < FAMILIES - 1]
    if len(names) >= FAMILIES:
        legend.append(Key("■", f"f{FAMILIES - 1}", short(names[-1]) if len(names) == FAMILIES else "other forms"))
    note = "The number is the largest rank of the layer's network; a dash is a layer that stayed one dense core."
    return _table(grid, "Form and rank of each layer", cell_of, tuple(legend), note)


def _count(grid: Grid, family: str) -> int:
    return sum(cell.family == family for cell in grid.values())


def _scale(
    grid: Grid, caption: str, value: Callable[[LayerCell], float | None], text: Callable[[LayerCell], str], log: bool = False
) -> HeatTable:
    known = [v for v in map(value, grid.values()) if v is not None and isfinite(v)]
    positive = [v for v in known if v > 0]
    log = log and bool(positive) and max(positive) > 10 * min(positive)
    low, high = (min(positive), max(positive)) if log else (min(known, default=0.0), max(known, default=1.0))

    def step(v: float) -> int:
        if high <= low or v <= low:
            return 0
        part = log10(v / low) / log10(high / low) if log else (v - low) / (high - low)
        return min(STEPS - 1, int(part * STEPS))

    def cell_of(cell: LayerCell) -> Cell:
        v = value(cell)
        return Cell(text(cell), True, describe(cell), "none" if v is None or not isfinite(v) else f"h{step(v)}")

    scale = None if high <= low else (significant(low, 2), significant(high, 2))
    legend = (Key("■", "h0", f"{significant(low)} everywhere"),) if scale is None else ()
    return _table(grid, caption, cell_of, legend, "", scale)


def _bits_text(cell: LayerCell) -> str:
    """The format without its group size, if it is short enough for a cell: ``int4``."""
    name = _GROUPED.sub("", plain(cell.formats))
    return name if len(name) <= 4 else significant(cell.bits_per_weight, 2)


def _error_text(cell: LayerCell) -> str:
    if cell.error is None or not isfinite(cell.error):
        return ""
    if cell.error < 0.0005:
        return "~0"
    return (f"{cell.error:.3f}" if cell.error < 0.0095 else f"{cell.error:.2f}").removeprefix("0")


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
    cells = tuple(
        tuple(cell_of(grid[block, kind]) if (block, kind) in grid else Cell("", tone="none") for block in blocks)
        for kind in kinds
    )
    names = tuple(_kind_name(kind, kinds) for kind in kinds)
    return HeatTable(caption, names, tuple(map(str, blocks)), cells, legend, scale, note)


def _kind_name(kind: str, kinds: Sequence[str]) -> str:
    """The last part of a name where that is enough to tell the kinds apart."""
    last = kind.rsplit(".", 1)[-1]
    return short(last if sum(other.rsplit(".", 1)[-1] == last for other in kinds) == 1 else kind, 22)
