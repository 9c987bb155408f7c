"""Quality against size: one line for each method."""

from __future__ import annotations

from math import inf
from typing import TYPE_CHECKING

from tensornet_compress.report.charts.axes import direction, named, style
from tensornet_compress.report.charts.palette import colour
from tensornet_compress.report.charts.series import Series, series
from tensornet_compress.report.charts.svg import Canvas, chart
from tensornet_compress.report.groups import Group, usable
from tensornet_compress.report.numbers import heading, lower_first, plain, short, with_unit
from tensornet_compress.report.parts import Chart

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_FAR = 3.0


def front_chart(group: Group, quality: str) -> Chart | None:
    """Every measured point of a group; ``None`` when nothing has both a size and the quality."""
    if group.size is None:
        return None
    size, measure = group.measures[group.size], group.measures[quality]
    lines = [line for line in series(group) if line.points(group.size, quality)]
    if sum(len(line.points(group.size, quality)) for line in lines) < 2:
        return None
    corner = "lower" if measure.better == "lower" else "upper"
    title = f"{heading(measure)} against {lower_first(plain(size.title))}: {plain(group.subject)}"
    description = (
        f"{len(lines)} methods; the best corner is the {corner} left: few bytes and {direction(measure)}. "
        "The numbers are in the table of all figures."
    )
    window, note = _window(group, lines, quality)
    keys = tuple(line.key for line in lines)
    return chart(title, description, lambda canvas: _draw(canvas, group, lines, quality, window), keys, note)


def _window(group: Group, lines: list[Series], quality: str) -> tuple[tuple[float, float], str]:
    """Sizes to draw, and what is said of the few points that lie far from all others and would squeeze them."""
    assert group.size is not None
    size, measure = group.measures[group.size], group.measures[quality]
    points = [(*point, line.method) for line in lines for point in line.points(group.size, quality)]
    sizes = sorted(point[0] for point in points)
    middle = sizes[len(sizes) // 10 : len(sizes) - len(sizes) // 10]
    low, high = middle[0] / _FAR, middle[-1] * _FAR
    outside = [point for point in points if not low <= point[0] <= high]
    if not outside or low <= 0:
        return (-inf, inf), ""
    said = "; ".join(
        dict.fromkeys(f"{short(name)} at {with_unit(at, size)}: {with_unit(value, measure)}" for at, value, name in outside)
    )
    return (low, high), f"Too far away to be drawn: {said}."


def _draw(canvas: Canvas, group: Group, lines: list[Series], quality: str, window: tuple[float, float]) -> Figure:
    assert group.size is not None
    size, measure = group.measures[group.size], group.measures[quality]
    figure = canvas.figure(330 if canvas.narrow else 420)
    axes = figure.add_subplot()
    everything: list[tuple[float, float]] = []
    for line in reversed(lines):
        points = [point for point in line.points(group.size, quality) if window[0] <= point[0] <= window[1]]
        everything += points
        across, up = [p[0] for p in points], [p[1] for p in points]
        weight = 2.8 if line.ours else 1.4
        order = 4 if line.ours else 3
        edge = colour("card")
        axes.plot(
            across, up, color=colour(line.ink), linewidth=weight, marker=line.marker, markersize=9 if line.ours else 7.5,
            markeredgecolor=edge, markeredgewidth=0.8, zorder=order,
        )  # fmt: skip
    best = staircase(everything, higher=measure.better == "higher")
    if len(best) > 1:
        axes.step(
            [p[0] for p in best],
            [p[1] for p in best],
            where="post",
            color=colour("muted"),
            linewidth=1,
            linestyle=":",
            zorder=2,
        )
    _before(axes, group, quality, [p[1] for p in everything])
    style(axes.xaxis, [p[0] for p in everything], size, 4 if canvas.narrow else 7)
    style(axes.yaxis, [p[1] for p in everything], measure)
    axes.set_xlabel(f"{named(size)}  (← smaller)")
    better = direction(measure)
    gap = "\n" if canvas.narrow else ", "
    axes.set_title(gap.join(part for part in (named(measure), better) if part), loc="left", color=colour("muted"))
    return figure


def _before(axes: Axes, group: Group, quality: str, shown: list[float]) -> None:
    """A line at the value of the uncompressed original, where that is near the measured ones."""
    if group.original is None or not usable(group.original, quality):
        return
    value = group.original.values[quality]
    if not 0.2 * min(shown) <= value <= 5 * max(shown) or value <= 0:
        return
    axes.axhline(value, color=colour("ink"), linewidth=1, linestyle="--", zorder=2)
    axes.annotate("before compression", (0.01, value), xycoords=("axes fraction", "data"), ha="left", va="bottom", zorder=5)


def staircase(points: list[tuple[float, float]], higher: bool) -> list[tuple[float, float]]:
    """Points (size, quality) that no smaller or equal one matches in quality."""
    found: list[tuple[float, float]] = []
    for across, up in sorted(points, key=lambda p: (p[0], -p[1] if higher else p[1])):
        if not found or (up > found[-1][1] if higher else up < found[-1][1]):
            found.append((across, up))
    return found
