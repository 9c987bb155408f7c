"""A drawn network: cores as discs, bonds as lines as thick as their rank, open legs as stubs."""

from __future__ import annotations

from math import cos, hypot, log2, pi, sin
from typing import TYPE_CHECKING

import networkx as nx

from tensornet_compress.report.charts.palette import colour
from tensornet_compress.report.charts.svg import Canvas, chart
from tensornet_compress.report.numbers import short
from tensornet_compress.report.parts import Chart
from tensornet_compress.report.schema import Drawing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Place = tuple[float, float]
MOST_CORES = 40
_STUB, _LABEL = 0.42, 0.56


def network_chart(drawing: Drawing) -> Chart:
    """The picture of a drawing, and what it shows in words."""
    legs = ", ".join(short(leg) for core in drawing.legs for leg in core) or "none"
    cores = len(drawing.legs)
    bonds = ", ".join(str(rank) for _, _, rank in drawing.edges)
    count = "one core, the plain tensor" if cores == 1 else f"{cores} cores, ranks {bonds}"
    return chart(short(drawing.title, 90), f"A network of {count}; open legs: {legs}.", lambda canvas: _draw(canvas, drawing))


def _draw(canvas: Canvas, drawing: Drawing) -> Figure:
    places = positions(drawing, canvas.narrow)
    everything = list(places.values())
    spare = 0.85
    left, right = min(p[0] for p in everything) - spare, max(p[0] for p in everything) + spare
    low, high = min(p[1] for p in everything) - 0.75, max(p[1] for p in everything) + 0.75
    unit = min((canvas.width - 8) / (right - left), 92.0)
    figure = canvas.figure(max(90.0, unit * (high - low)))
    axes = figure.add_subplot()
    axes.set_aspect("equal")
    half = canvas.width / unit / 2
    middle = (left + right) / 2
    axes.set_xlim(middle - half, middle + half)
    axes.set_ylim(low, high)
    axes.axis("off")
    small = unit < 55
    for one, other, rank in drawing.edges:
        _bond(axes, places[one], places[other], rank, small)
    for core, legs in enumerate(drawing.legs):
        around = [places[b if a == core else a] for a, b, _ in drawing.edges if core in (a, b)]
        _legs(axes, places[core], legs, around, small)
    for place in everything:
        axes.scatter(*place, s=(unit * 0.36) ** 2, color=colour("node"), edgecolors=colour("card"), linewidths=1.2, zorder=3)
    return figure


def _bond(axes: Axes, one: Place, other: Place, rank: int, small: bool) -> None:
    width = 1.2 + 0.7 * log2(max(rank, 1))
    axes.plot([one[0], other[0]], [one[1], other[1]], color=colour("muted"), linewidth=width, zorder=1, solid_capstyle="round")
    middle = ((one[0] + other[0]) / 2, (one[1] + other[1]) / 2)
    across, up = other[0] - one[0], other[1] - one[1]
    length = hypot(across, up) or 1.0
    shift = 0.17 + 0.012 * width
    at = (middle[0] - up / length * shift, middle[1] + across / length * shift)
    if at[1] < middle[1]:
        at = (2 * middle[0] - at[0], 2 * middle[1] - at[1])
    axes.text(*at, f"{rank:,}", ha="center", va="center", fontsize=9 if small else 11, fontweight="bold", zorder=4)


def _legs(axes: Axes, place: Place, legs: tuple[str, ...], around: list[Place], small: bool) -> None:
    for angle, leg in zip(free_angles(place, around, len(legs)), legs):
        across, up = cos(angle), sin(angle)
        axes.plot(
            [place[0], place[0] + _STUB * across],
            [place[1], place[1] + _STUB * up],
            color=colour("muted"),
            linewidth=1.2,
            zorder=1,
        )
        side = "center" if abs(across) < 0.5 else "left" if across > 0 else "right"
        axes.text(
            place[0] + _LABEL * across, place[1] + _LABEL * up, short(leg, 14), ha=side, va="center", color=colour("muted"),
            fontsize=9 if small else 10.5, zorder=4,
        )  # fmt: skip


def free_angles(place: Place, around: list[Place], count: int) -> list[float]:
    """Directions for ``count`` legs in the widest gap between a core's bonds, or downwards where all are alike."""
    from math import atan2

    if not count:
        return []
    taken = sorted(atan2(p[1] - place[1], p[0] - place[0]) for p in around)
    if not taken:
        return [-pi / 2 + 2 * pi * number / count for number in range(count)] if count > 1 else [-pi / 2]
    gaps = [(taken[(i + 1) % len(taken)] - taken[i]) % (2 * pi) or 2 * pi for i in range(len(taken))]
    widest = max(range(len(gaps)), key=lambda i: (round(gaps[i], 6), -abs(taken[i] + gaps[i] / 2 + pi / 2)))
    return [taken[widest] + gaps[widest] * (number + 1) / (count + 1) for number in range(count)]


def positions(drawing: Drawing, narrow: bool) -> dict[int, Place]:
    """Where each core goes: a chain in rows, a tree in levels, anything else by its distances."""
    graph: nx.Graph = nx.Graph()
    graph.add_nodes_from(range(len(drawing.legs)))
    graph.add_edges_from((one, other) for one, other, _ in drawing.edges)
    if len(graph) == 1:
        return {0: (0.0, 0.0)}
    ends = sorted(core for core in graph if graph.degree(core) == 1)
    if nx.is_connected(graph) and len(ends) == 2 and max(dict(graph.degree()).values()) <= 2:
        return _snake(nx.shortest_path(graph, ends[0], ends[1]), 3 if narrow else 8)
    if nx.is_tree(graph):
        return _levels(graph, narrow)
    found = nx.circular_layout(graph, scale=max(1.0, len(graph) / 4))
    return {int(core): (float(at[0]), float(at[1])) for core, at in found.items()}


def _snake(path: list[int], across: int) -> dict[int, Place]:
    """Along rows of ``across`` cores, back and forth, so that neighbours stay beside each other."""
    found = {}
    for number, core in enumerate(path):
        row, column = divmod(number, across)
        found[core] = (1.25 * (column if row % 2 == 0 else across - 1 - column), -1.7 * row)
    return found


def _levels(graph: nx.Graph, narrow: bool) -> dict[int, Place]:
    """Root at a centre; leaves side by side, each core above the middle of what hangs below it. Turned for narrow pages."""
    root = min(nx.center(graph))
    below: dict[int, list[int]] = {core: [] for core in graph}
    depth = {root: 0}
    order = [root]
    for core in order:
        for other in sorted(graph[core]):
            if other not in depth:
                depth[other] = depth[core] + 1
                below[core].append(other)
                order.append(other)
    across: dict[int, float] = {}

    def place(core: int, free: float) -> float:
        if not below[core]:
            across[core] = free
            return free + 1.0
        for other in below[core]:
            free = place(other, free)
        across[core] = sum(across[other] for other in below[core]) / len(below[core])
        return free

    place(root, 0.0)
    if narrow and len([core for core in graph if not below[core]]) > 4:
        return {core: (1.15 * depth[core], -0.85 * across[core]) for core in graph}
    return {core: (1.15 * across[core], -1.15 * depth[core]) for core in graph}
