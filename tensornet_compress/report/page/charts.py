"""Charts: lines for quality against size and for spectra, bars for bytes, times and cache bits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf
from typing import TYPE_CHECKING

from tensornet_compress.report.page.canvas import OURS, PEERS, Canvas, chart, colour, scale
from tensornet_compress.report.page.groups import Group, usable
from tensornet_compress.report.page.numbers import (
    amount,
    heading,
    lower_first,
    named,
    number,
    plain,
    short,
    significant,
    with_unit,
)
from tensornet_compress.report.page.parts import Chart, Key
from tensornet_compress.report.schema import BitsOfLayer, Measure, Row, Spectrum

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MARKERS = (("o", "●"), ("s", "■"), ("^", "▲"), ("D", "◆"), ("v", "▼"), ("P", "✚"), ("X", "✖"), ("*", "★"))
DIRECTIONS = {"lower": "lower is better", "higher": "higher is better", None: ""}
_PARTS = (OURS[0], *PEERS)
_FAR = 3.0
_FLOOR = 1e-7
Point = tuple[float, float]


@dataclass(frozen=True)
class Line:
    """Points in rising order, and the standard errors of what they are drawn up to. ``marker`` is matplotlib's; ``key``, the
    entry of the legend, has the same shape."""

    thick: bool
    marker: str
    key: Key
    points: tuple[Point, ...]
    errors: tuple[float, ...] = ()


def front_chart(group: Group, quality: str) -> Chart | None:
    """Quality against size for every row of a group; ``None`` when fewer than two have both."""
    methods = [] if group.size is None else _methods(group, group.size, quality)
    if group.size is None or sum(len(line.points) for line in methods) < 2:
        return None
    size, measure = group.measures[group.size], group.measures[quality]
    before = group.original.values[quality] if group.original is not None and usable(group.original, quality) else None
    low, high = _window(methods)
    outside = [
        f"{line.key.label} at {with_unit(across, size)}: {with_unit(up, measure)}"
        for line in methods
        for across, up in line.points
        if not low <= across <= high
    ]

    def finish(axes: Axes, canvas: Canvas, points: Sequence[Point]) -> None:
        across, up = zip(*points)
        best = staircase(points, higher=measure.better == "higher")
        if len(best) > 1:
            axes.step(*zip(*best), where="post", color=colour("muted"), linewidth=1, linestyle=":", zorder=2)
        if before is not None and before > 0 and 0.2 * min(up) <= before <= 5 * max(up):
            axes.axhline(before, color=colour("ink"), linewidth=1, linestyle="--", zorder=2)
            place, frame = (0.01, before), ("axes fraction", "data")
            axes.annotate("before compression", place, xycoords=frame, ha="left", va="bottom", zorder=5)
        scale(axes.xaxis, across, size, 4 if canvas.narrow else 7)
        scale(axes.yaxis, up, measure)
        axes.set_xlabel(f"{named(size)}  (← smaller)")
        title = ("\n" if canvas.narrow else ", ").join(filter(None, (named(measure), DIRECTIONS[measure.better])))
        axes.set_title(title, loc="left", color=colour("muted"))

    title = f"{heading(measure)} against {lower_first(size.title)}: {group.subject}"
    corner = "lower" if measure.better == "lower" else "upper"
    description = (
        f"{len(methods)} methods; the best corner is the {corner} left: few bytes and {DIRECTIONS[measure.better]}. "
        "The numbers are in the table of all figures."
    )
    note = f"Too far away to be drawn: {'; '.join(dict.fromkeys(outside))}." if outside else ""
    shown = [_between(line, low, high) for line in methods]
    return _line_chart(title, description, shown, finish, note)


def _between(line: Line, low: float, high: float) -> Line:
    """The part of a line whose points have sizes between these."""
    kept = [(point, error) for point, error in zip(line.points, line.errors) if low <= point[0] <= high]
    return replace(line, points=tuple(point for point, _ in kept), errors=tuple(error for _, error in kept))


def _methods(group: Group, size: str, quality: str) -> list[Line]:
    """The methods of a group that have both measures, ours first."""
    methods: dict[tuple[bool, str], list[Row]] = {}
    for row in group.rivals:
        methods.setdefault((row.ours, row.method), []).append(row)
    made: list[Line] = []
    count = {True: 0, False: 0}
    for ours, method in methods:
        inks, place = OURS if ours else PEERS, count[ours]
        count[ours] += 1
        # A peer must not share its mark with one of ours of the same rank, since not everyone tells all colours apart.
        marker, mark = MARKERS[(place + (0 if ours else len(OURS)) + place // len(inks)) % len(MARKERS)]
        key = Key(mark, inks[place % len(inks)], short(method) + (" (ours)" if ours and "ours" not in method else ""))
        rows = [row for row in methods[ours, method] if usable(row, size) and usable(row, quality)]
        if rows:
            rows.sort(key=lambda row: (row.values[size], row.values[quality]))
            points = tuple((row.values[size], row.values[quality]) for row in rows)
            made.append(Line(ours, marker, key, points, tuple(row.errors.get(quality, 0.0) for row in rows)))
    return made


def _window(lines: Sequence[Line]) -> Point:
    """Sizes to draw: without the few points that lie far from all others and would squeeze them."""
    sizes = sorted(across for line in lines for across, _ in line.points)
    middle = sizes[len(sizes) // 10 : len(sizes) - len(sizes) // 10]
    return (middle[0] / _FAR, middle[-1] * _FAR) if middle[0] > 0 else (-inf, inf)


def staircase(points: Sequence[Point], higher: bool) -> list[Point]:
    """Points (size, quality) that no smaller or equal one matches in quality."""
    steps: list[Point] = []
    for across, up in sorted(points, key=lambda p: (p[0], -p[1] if higher else p[1])):
        if not steps or (up > steps[-1][1] if higher else up < steps[-1][1]):
            steps.append((across, up))
    return steps


def spectrum_chart(spectrum: Spectrum, owner: str) -> Chart:
    """Singular values in falling order, before and after."""
    sides = (
        (spectrum.before, "o", Key("●", "before", "before ordering")),
        (spectrum.after, "s", Key("■", "after", "after ordering")),
    )
    reach = [f"{sum(value > 0.01 for value in values)} of {len(values)} {key.label}" for values, _, key in sides]
    description = f"Singular values above one percent of the largest: {', '.join(reach)}. A line that falls sooner needs fewer."

    def finish(axes: Axes, canvas: Canvas, points: Sequence[Point]) -> None:
        scale(axes.xaxis, [], most=5 if canvas.narrow else 9)
        scale(axes.yaxis, [up for _, up in points])
        axes.set_xlabel("singular value, from the largest down")
        axes.set_title("size, largest = 1", loc="left", color=colour("muted"))

    lines = [
        Line(True, marker, key, tuple((place, value) for place, value in enumerate(values, 1) if value > _FLOOR))
        for values, marker, key in sides
    ]
    return _line_chart(f"{spectrum.title}: {owner}", description, lines, finish)


def _line_chart(
    title: str,
    description: str,
    lines: Sequence[Line],
    finish: Callable[[Axes, Canvas, Sequence[Point]], None],
    note: str = "",
) -> Chart:
    """All lines, the first on top; ``finish`` adds axes and whatever else there is."""

    def draw(canvas: Canvas) -> Figure:
        figure, axes = canvas.axes(330 if canvas.narrow else 420)
        for line in reversed(lines):
            size = 0.0 if len(line.points) > 40 else 9 if line.thick else 7.5
            if any(line.errors):
                across, up = zip(*line.points)
                axes.errorbar(
                    across, up, line.errors, fmt="none", ecolor=colour(line.key.ink), elinewidth=1, capsize=3, zorder=3
                )
            axes.plot(
                [p[0] for p in line.points], [p[1] for p in line.points], color=colour(line.key.ink), marker=line.marker,
                linewidth=2.8 if line.thick else 1.4, markersize=size, markeredgecolor=colour("card"), markeredgewidth=0.8,
                zorder=4 if line.thick else 3,
            )  # fmt: skip
        finish(axes, canvas, [point for line in lines for point in line.points])
        return figure

    return chart(title, description, draw, tuple(line.key for line in lines), note)


def value_bars(title: str, measure: Measure, items: Sequence[tuple[str, float, bool]]) -> Chart:
    """One bar for each (name, value, whether it is ours); ours in our colour."""
    unit = plain(measure.unit).strip()
    both = {ours for _, _, ours in items} == {True, False}
    keys = (Key("■", OURS[0], "ours"), Key("■", "muted", "peers and baselines")) if both else ()
    told = [f"{number(value, 3)} {unit}".strip() for _, value, _ in items]
    rows = [(name, text, [(value, OURS[0] if ours else "muted")]) for (name, value, ours), text in zip(items, told)]
    return _bar_chart(title, f"Bars, in {unit or 'plain numbers'}", rows, keys)


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
    return _bar_chart(title, "Stacked bars of stored bytes", rows, tuple(keys))


def _bar_chart(
    title: str, what: str, rows: Sequence[tuple[str, str, Sequence[tuple[float, str]]]], keys: tuple[Key, ...]
) -> Chart:
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

    said = "; ".join(f"{name}: {told}" for name, told, _ in rows)
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
