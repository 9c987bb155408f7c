"""Charts of bars: bytes by part, one value for each method, and cache bits over layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from tensornet_compress.report.page.canvas import OURS, PEERS, Canvas, chart, colour, scale
from tensornet_compress.report.page.numbers import amount, number, plain, short, significant
from tensornet_compress.report.page.parts import Chart, Key
from tensornet_compress.report.schema import BitsOfLayer, Measure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_PARTS = (OURS[0], *PEERS)


def value_bars(title: str, measure: Measure, items: Sequence[tuple[str, float, bool]]) -> Chart:
    """One bar for each (name, value, whether it is ours); ours in our colour."""
    unit = plain(measure.unit).strip()
    both = {ours for _, _, ours in items} == {True, False}
    keys = (Key("■", OURS[0], "ours"), Key("■", "muted", "peers and baselines")) if both else ()
    told = [f"{number(value, 3)} {unit}".strip() for _, value, _ in items]
    rows = [(name, text, [(value, OURS[0] if ours else "muted")]) for (name, value, ours), text in zip(items, told)]
    return _bars(title, f"Bars, in {unit or 'plain numbers'}", rows, keys)


def byte_bars(title: str, ledgers: Mapping[str, Mapping[str, int]]) -> Chart:
    """One bar for each ledger, cut into its parts; the smallest of many parts are taken together."""
    sums: dict[str, int] = {}
    for ledger in ledgers.values():
        for part, size in ledger.items():
            sums[part] = sums.get(part, 0) + size
    inks = dict(zip(sorted(sums, key=lambda part: (-sums[part], part)), _PARTS))
    rows = []
    for name, ledger in ledgers.items():
        pieces = [(float(ledger.get(part, 0)), ink) for part, ink in inks.items()]
        total = sum(ledger.values())
        rows.append((name, amount(total), [*pieces, (total - sum(size for size, _ in pieces), "muted")]))
    keys = [Key("■", ink, short(part)) for part, ink in inks.items()]
    keys += [Key("■", "muted", "everything else")] if len(sums) > len(inks) else []
    return _bars(title, "Stacked bars of stored bytes", rows, tuple(keys))


def _bars(title: str, what: str, rows: Sequence[tuple[str, str, Sequence[tuple[float, str]]]], keys: tuple[Key, ...]) -> Chart:
    """For each (name, text of its value, pieces with their colours) one bar with both texts above it."""
    totals = [sum(size for size, _ in pieces) for _, _, pieces in rows]
    low, high = min(0.0, *totals), max(1e-12, *totals)

    def draw(canvas: Canvas) -> Figure:
        figure, axes = canvas.axes(12 + 40 * len(rows))
        for place, (name, told, pieces) in enumerate(rows):
            left = 0.0
            for size, ink in pieces:
                axes.barh(place, size, 0.4, left, color=colour(ink), edgecolor=colour("card"), linewidth=0.8)
                left += size
            axes.text(low, place - 0.26, short(name, 34 if canvas.narrow else 80), va="bottom", ha="left")
            axes.text(high, place - 0.26, told, va="bottom", ha="right", color=colour("muted"))
        axes.set(xlim=(low, high), ylim=(len(rows) - 0.6, -0.85))
        axes.axis("off")
        return figure

    said = "; ".join(f"{plain(name)}: {told}" for name, told, _ in rows)
    return chart(title, f"{what}. {said}.", draw, keys)


def cache_bits_chart(title: str, layers: Sequence[BitsOfLayer]) -> Chart:
    """Bits per number that each layer's keys and values get."""
    keys, values = [layer.keys for layer in layers], [layer.values for layer in layers]
    means = [significant(sum(side) / len(layers)) for side in (keys, values)]
    said = f"on average {means[0]} bits for a number of the keys and {means[1]} for one of the values."

    def draw(canvas: Canvas) -> Figure:
        figure, axes = canvas.axes(230 if canvas.narrow else 260)
        for side, ink, shift in ((keys, "keys", -0.2), (values, "values", 0.2)):
            axes.bar([layer.layer + shift for layer in layers], side, 0.4, color=colour(ink))
        scale(axes.xaxis, [], most=6 if canvas.narrow else 15)
        axes.margins(x=0.01)
        axes.grid(visible=False, axis="x")
        axes.set_xlabel("layer")
        axes.set_title("bits per number", loc="left", color=colour("muted"))
        return figure

    return chart(title, f"{len(layers)} layers; {said}", draw, (Key("■", "keys", "keys"), Key("■", "values", "values")))
