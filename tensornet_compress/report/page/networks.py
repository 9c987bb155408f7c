"""A drawn network: cores as discs, bonds as lines as thick as their rank, open legs as stubs. networkx says where they go."""

from __future__ import annotations

from math import atan2, cos, log2, pi, sin
from typing import TYPE_CHECKING

import networkx as nx
import numpy as np

from tensornet_compress.report.page.canvas import Canvas, chart, colour
from tensornet_compress.report.page.numbers import short
from tensornet_compress.report.page.parts import Chart
from tensornet_compress.report.schema import Drawing

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

Node = int | tuple[int, int]
MOST_CORES = 14
_LEG = 0.6
_MARGIN = 46.0


def network_chart(drawing: Drawing) -> Chart:
    """The picture of a drawing, and what it shows in words."""
    legs = ", ".join(short(leg) for core in drawing.legs for leg in core) or "none"
    ranks = ", ".join(str(rank) for _, _, rank in drawing.edges)
    count = "one core, the plain tensor" if len(drawing.legs) == 1 else f"{len(drawing.legs)} cores, ranks {ranks}"
    places = positions(drawing)
    return chart(
        short(drawing.title, 90), f"A network of {count}; open legs: {legs}.", lambda canvas: _draw(canvas, drawing, places)
    )


def positions(drawing: Drawing) -> dict[Node, NDArray[np.float64]]:
    """Places of cores and of the ends of their legs (core, number): the networks of a sum side by side, bonds of length 1."""
    graph: nx.Graph = nx.Graph([edge[:2] for edge in drawing.edges])
    graph.add_nodes_from(range(len(drawing.legs)))
    places: dict[Node, NDArray[np.float64]] = {}
    start = 0.0
    for network in map(graph.subgraph, nx.connected_components(graph)):
        straight = max(degree for _, degree in network.degree) <= 2
        found = nx.bfs_layout(network, nx.periphery(network)[0]) if straight else nx.kamada_kawai_layout(network)
        length = np.mean([np.linalg.norm(found[a] - found[b]) for a, b in network.edges]) if network.edges else 1.0
        left = min(place[0] for place in found.values())
        places |= {core: (place - (left, 0)) / length + (start, 0) for core, place in found.items()}
        start = max(place[0] for place in places.values()) + 2.0
    for core, legs in enumerate(drawing.legs):
        taken = sorted(atan2(*(places[other] - places[core])[::-1]) for other in graph[core])
        first = core % max(1, len(taken))  # Legs of neighbours in a chain point up and down in turns.
        for number, angle in enumerate(_free_angles([*taken[first:], *taken[:first]], len(legs))):
            places[core, number] = places[core] + _LEG * np.array((cos(angle), sin(angle)))
    return places


def _free_angles(taken: list[float], count: int) -> list[float]:
    """Directions for ``count`` legs, spread over the gaps between the directions that a core's bonds take."""
    if not taken:
        return [pi / 2 + 2 * pi * number / count for number in range(count)]
    gaps = [(after - before) % (2 * pi) or 2 * pi for before, after in zip(taken, (*taken[1:], taken[0]))]
    legs = [0] * len(gaps)
    for _ in range(count):
        legs[max(range(len(gaps)), key=lambda place: round(gaps[place] / (legs[place] + 1), 6))] += 1
    return [start + gap * (number + 1) / (many + 1) for start, gap, many in zip(taken, gaps, legs) for number in range(many)]


def _draw(canvas: Canvas, drawing: Drawing, places: dict[Node, NDArray[np.float64]]) -> Figure:
    """On narrow pages a network runs downwards."""
    if canvas.narrow:
        places = {node: np.array((place[1], -place[0])) for node, place in places.items()}
    corners = np.array(list(places.values()))
    low, high = corners.min(0), corners.max(0)
    unit = min((canvas.width - 2 * _MARGIN) / max((high - low)[0], 1.0), 92.0)
    figure, axes = canvas.axes(unit * (high - low)[1] + _MARGIN)
    axes.axis("off")
    middle, half = (low + high)[0] / 2, canvas.width / unit / 2
    over = _MARGIN / unit / 2
    axes.set(aspect="equal", xlim=(middle - half, middle + half), ylim=(low[1] - over, high[1] + over))
    graph: nx.Graph = nx.Graph()
    graph.add_nodes_from(places)
    cores = range(len(drawing.legs))
    bonds = {edge[:2]: f"{edge[2]:,}" for edge in drawing.edges}
    legs = {(core, number): short(leg, 14) for core in cores for number, leg in enumerate(drawing.legs[core])}
    thick = [1.2 + 0.7 * log2(max(edge[2], 1)) for edge in drawing.edges]
    size, behind = (9 if unit < 55 else 11), {"color": colour("card"), "pad": 1.0, "linewidth": 0}
    nx.draw_networkx_edges(graph, places, list(bonds), ax=axes, width=thick, edge_color=colour("muted"))
    nx.draw_networkx_edges(graph, places, [(leg[0], leg) for leg in legs], ax=axes, width=1.2, edge_color=colour("muted"))
    nx.draw_networkx_nodes(graph, places, cores, ax=axes, node_size=(unit * 0.32) ** 2, node_color=colour("node"))
    nx.draw_networkx_edge_labels(
        graph, places, bonds, ax=axes, rotate=False, font_size=size, font_color=colour("ink"), bbox=behind
    )
    nx.draw_networkx_labels(graph, places, legs, ax=axes, font_size=size, font_color=colour("muted"), bbox=behind)
    return figure
