"""Bars: stacked for byte ledgers, single for times."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tensornet_compress.report.charts.axes import tick
from tensornet_compress.report.charts.palette import OURS, PEERS, colour
from tensornet_compress.report.charts.svg import Canvas, chart
from tensornet_compress.report.numbers import amount, number, plain, short
from tensornet_compress.report.parts import Chart, Key
from tensornet_compress.report.schema import Measure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_INKS = (OURS[0], PEERS[0], PEERS[1], PEERS[2], PEERS[3], PEERS[4], PEERS[5], PEERS[6], PEERS[7], "muted")
_BYTES = Measure(title="Stored bytes", unit="bytes")


@dataclass(frozen=True)
class Bar:
    """One bar: its name, its value and whether it is ours."""

    label: str
    value: float
    ours: bool


def stacked(title: str, ledgers: Mapping[str, Mapping[str, int]]) -> Chart:
    """One bar for each ledger, cut into its parts."""
    sums: dict[str, int] = {}
    for ledger in ledgers.values():
        for part, size in ledger.items():
            sums[part] = sums.get(part, 0) + size
    ranked = sorted(sums, key=lambda part: (-sums[part], part))
    parts, rest = ranked[: len(_INKS) - 1], ranked[len(_INKS) - 1 :]
    rows: dict[str, dict[str, int]] = {}
    for name, ledger in ledgers.items():
        rows[name] = {part: ledger.get(part, 0) for part in parts}
        if rest:
            rows[name]["everything else"] = sum(ledger.get(part, 0) for part in rest)
    inks = dict(zip([*parts, "everything else"] if rest else parts, _INKS))
    said = "; ".join(f"{plain(name)}: {amount(sum(ledger.values()))}" for name, ledger in ledgers.items())
    keys = tuple(Key("■", ink, short(part)) for part, ink in inks.items())
    return chart(title, f"Stacked bars of stored bytes. {said}.", lambda canvas: _stacked(canvas, rows, inks), keys)


def _stacked(canvas: Canvas, rows: Mapping[str, Mapping[str, int]], inks: Mapping[str, str]) -> Figure:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    each = 44
    figure = canvas.figure(46 + each * len(rows))
    axes = figure.add_subplot()
    longest = max(sum(ledger.values()) for ledger in rows.values()) or 1
    for place, (name, ledger) in enumerate(rows.items()):
        left = 0
        for part, size in ledger.items():
            axes.barh(place, size, left=left, height=0.44, color=colour(inks[part]), edgecolor=colour("card"), linewidth=0.8)
            left += size
        axes.text(0, place - 0.29, short(name, 44 if canvas.narrow else 90), va="bottom", ha="left")
        axes.text(longest, place - 0.29, amount(left), va="bottom", ha="right", color=colour("muted"))
    axes.set_ylim(len(rows) - 0.5, -0.85)
    axes.set_xlim(0, longest)
    axes.yaxis.set_visible(False)
    axes.spines["left"].set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(3 if canvas.narrow else 6))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: tick(value, _BYTES)))
    return figure


def bars(title: str, measure: Measure, items: Sequence[Bar]) -> Chart:
    """One bar for each item, with its value; ours in our colour."""
    unit = plain(measure.unit).strip()
    said = "; ".join(f"{plain(item.label)}: {number(item.value)}" for item in items)
    description = f"Bars, in {unit or 'plain numbers'}. {said}."
    keys: tuple[Key, ...] = ()
    if {item.ours for item in items} == {True, False}:
        keys = (Key("■", OURS[0], "ours"), Key("■", "muted", "peers and baselines"))
    return chart(title, description, lambda canvas: _bars(canvas, items, unit), keys)


def _bars(canvas: Canvas, items: Sequence[Bar], unit: str) -> Figure:
    figure = canvas.figure(12 + 40 * len(items))
    axes = figure.add_subplot()
    largest, least = max(item.value for item in items), min(item.value for item in items)
    for place, item in enumerate(items):
        axes.barh(place, item.value, height=0.4, color=colour(OURS[0] if item.ours else "muted"))
        axes.text(min(0.0, least), place - 0.26, short(item.label, 34 if canvas.narrow else 80), va="bottom", ha="left")
        axes.text(
            largest, place - 0.26, f"{number(item.value, 3)} {unit}".strip(), va="bottom", ha="right", color=colour("muted")
        )
    axes.set_xlim(min(0.0, least), max(largest, 1e-12))
    axes.set_ylim(len(items) - 0.6, -0.85)
    axes.axis("off")
    return figure
