"""The picture of a search."""

from __future__ import annotations

from typing import TYPE_CHECKING

import networkx as nx

from tensornet_compress.errors import MissingExtraError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from tensornet_compress.searching.result import SearchResult


def draw(result: SearchResult) -> Figure:
    """Three panels: everything measured with its front, spectra of the best cut without and with ordering, the network."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError("plots need matplotlib; run: python -m pip install 'tensornet-compress[report]'") from error
    figure = Figure(figsize=(13, 4), layout="constrained")
    points, spectra, drawing = figure.subplots(1, 3)
    families = sorted({item.family for item in result.found})
    for number, family in enumerate(families):
        mine = [item for item in result.found if item.family == family]
        points.scatter([i.nbytes for i in mine], [i.error for i in mine], label=family, color=f"C{number}")
    points.plot([i.nbytes for i in result.pareto], [i.error for i in result.pareto], color="0.6", zorder=0)
    points.scatter([result.choice.nbytes], [result.choice.error], s=140, facecolors="none", edgecolors="k")
    points.set(xscale="log", xlabel="stored bytes", ylabel="relative error", title="measured networks")
    if all(item.error > 0 for item in result.found):
        points.set_yscale("log")
    points.legend(fontsize=8)
    for label, values in result.spectra.items():
        spectra.semilogy(range(1, len(values) + 1), values, label=label)
    spectra.set(xlabel="index", ylabel="singular value / largest", title="widest cut")
    if result.spectra:
        spectra.legend(fontsize=8)
    term = result.best.spec.terms[0]
    graph = term.topology.graph()
    sizes = term.layout.dims
    axes = term.layout.position_axes
    labels = {c: "\n".join(f"axis {axes[p]}: {sizes[p]}" for p in graph.nodes[c]["legs"]) for c in graph}
    at = nx.kamada_kawai_layout(graph) if len(graph) > 1 else {0: (0.0, 0.0)}
    nx.draw_networkx(graph, at, labels=labels, ax=drawing, node_size=900, node_color="#cfe3ff", font_size=7)
    bonds = {(a, b): str(term.ranks[data["bond"]]) for a, b, data in graph.edges(data=True)}
    nx.draw_networkx_edge_labels(graph, at, edge_labels=bonds, ax=drawing, font_size=7)
    drawing.set(title=f"{result.choice.family}, {result.choice.nbytes:,} bytes")
    drawing.axis("off")
    return figure
