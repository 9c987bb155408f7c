"""What a search measured, how the limit judges it, and what is said and drawn of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import inf
from typing import TYPE_CHECKING

import networkx as nx

from tensornet_compress.errors import MissingExtraError, TensorNetError
from tensornet_compress.searching.limits import Limit, Priced
from tensornet_compress.tensor import TensorNetwork

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_PRECISION = 1e-6
_WRONG = 1.3


@dataclass(frozen=True)
class Found:
    """A network that was made and measured: ``error`` is relative, in the metric of the search."""

    family: str
    network: TensorNetwork
    error: float
    ordered: bool

    @cached_property
    def nbytes(self) -> int:
        """Stored bytes, orders included."""
        return self.network.nbytes

    def describe(self) -> str:
        """One line."""
        return f"{self.family}: {self.nbytes:,} bytes, error {self.error:.3g}, {self.network.spec.describe()}"


@dataclass(frozen=True)
class Event:
    """Something the search did: at ``seconds``, ``what``, and the bytes and error that this predicted or measured."""

    seconds: float
    what: str
    nbytes: int
    error: float


@dataclass(frozen=True)
class Null:
    """The same search on the same entries shuffled: what it wins is luck. Of several shuffles the luckiest. ``gain``: bytes
    without ordering over bytes with; ``entry_gain``: of all else over the best entry sort (0: none asked for, or none within
    the limit). ``measured``: how many networks; ``finished``: whether it came to its end; ``gains``: those of all shuffles that
    did."""

    nbytes: int
    error: float
    gain: float
    family: str
    entry_gain: float = 0.0
    measured: int = 0
    finished: bool = True
    gains: tuple[float, ...] = ()


class Measured:
    """All networks that were measured so far, judged by a limit."""

    def __init__(self, limit: Limit):
        self.limit = limit
        self.networks: list[Found] = []

    def best(self, native_only: bool = False) -> Found | None:
        """The best that is within the limit, of all or of those in native order; ties go to native order."""
        kept = [item for item in self.networks if self.limit.keeps(item) and not (native_only and item.ordered)]
        return min(kept, key=lambda item: self.limit.sort_key(item, item.ordered), default=None)

    def nearest(self, native_only: bool = False) -> Found:
        """What comes nearest to the limit."""
        items = [item for item in self.networks if not (native_only and item.ordered)]
        return min(items, key=lambda item: item.nbytes if self.limit.max_error is None else item.error)

    def unordered(self) -> Found:
        """The best without any ordering; what comes nearest where none keeps the limit."""
        return self.best(native_only=True) or self.nearest(native_only=True)

    def choice(self) -> Found:
        """``best``; raises ``TensorNetError`` where nothing is within the limit."""
        best = self.best()
        if best is not None:
            return best
        nearest = self.nearest()
        if self.limit.max_error is not None:
            raise TensorNetError(
                f"no form keeps {self.limit}; the best reached {nearest.error:.3g} ({nearest.describe()}): cores have "
                "at most single precision; allow a larger error, or rescale numbers beyond its range"
            )
        raise TensorNetError(
            f"no form keeps {self.limit}; the smallest tried takes {nearest.nbytes:,} bytes ({nearest.family})"
        )

    def gain(self) -> float:
        """Bytes (or error) without ordering over those with; infinite where only an ordered network is within the limit. Errors
        below the precision of fp32 cores count as equal."""
        without, best = self.unordered(), self.choice()
        if not self.limit.keeps(without):
            return inf
        if self.limit.max_error is not None:
            return without.nbytes / best.nbytes
        return max(without.error, _PRECISION) / max(best.error, _PRECISION)

    def hopeless(self, candidate: Priced) -> bool:
        """Whether the best is smaller (or nearer) than a candidate by more than predictions are wrong by."""
        best = self.best()
        return best is not None and self.limit.cost(candidate) > _WRONG * self.limit.cost(best)


@dataclass(frozen=True)
class SearchResult:
    """``best``: the network of choice. ``found``: everything measured. ``unordered``: the best that leaves all orders native.
    ``gain``: bytes (or errors, for a byte limit) without ordering over those with; it counts only beyond ``null.gain``.
    ``entry_sort``: the best entry sort, when these were asked for and one keeps the limit."""

    best: TensorNetwork
    choice: Found
    unordered: Found
    found: tuple[Found, ...]
    gain: float
    null: Null | None
    reason: str
    limit: str
    seconds: float
    unfoldings: int
    finished: bool
    spectra: dict[str, list[float]]
    history: tuple[Event, ...] = field(repr=False)
    entry_sort: Found | None = None

    @property
    def error(self) -> float:
        """Measured relative error of ``best``."""
        return self.choice.error

    @property
    def pareto(self) -> tuple[Found, ...]:
        """Measured networks that no other beats in bytes and error, by ascending bytes."""
        front: list[Found] = []
        for item in sorted(self.found, key=lambda f: (f.nbytes, f.error)):
            if not front or item.error < front[-1].error:
                front.append(item)
        return tuple(front)

    def __str__(self) -> str:
        lines = [
            f"search for {self.limit}: {self.choice.describe()}",
            f"  {self.reason}",
            f"  without any ordering: {self.unordered.describe()}",
        ]
        if self.null is not None:
            luck = f"{self.null.family}, {self.null.nbytes:,} bytes, gain {self.null.gain:.3f}, {self.null.measured} measured"
            luck += f", {len(self.null.gains)} shuffles" if len(self.null.gains) > 1 else ""
            luck += "" if self.null.finished else ", stopped before its end"
            lines.append(f"  null control (same entries shuffled): {luck}")
        if self.entry_sort is not None:
            lines.append(f"  entry sort: {self.entry_sort.describe()}")
        state = "finished" if self.finished else "stopped before its end; this is the best so far"
        lines.append(f"  {len(self.found)} networks measured, {self.unfoldings} unfoldings, {self.seconds:.1f} s, {state}")
        lines += [f"  {'*' if item is self.choice else ' '} {item.describe()}" for item in self.pareto]
        return "\n".join(lines)

    def plot(self) -> Figure:
        """Pareto front, spectra before and after ordering, and the drawn network; needs matplotlib (extra ``report``)."""
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise MissingExtraError("plots need matplotlib; run: python -m pip install 'tensornet-compress[report]'") from error
        figure = Figure(figsize=(13, 4), layout="constrained")
        points, spectra, drawing = figure.subplots(1, 3)
        _draw_measured(points, self.found, self.pareto, self.choice)
        for label, values in self.spectra.items():
            spectra.semilogy(range(1, len(values) + 1), values, label=label)
        spectra.set(xlabel="index", ylabel="singular value / largest", title="widest cut")
        if self.spectra:
            spectra.legend(fontsize=8)
        _draw_network(drawing, self.best)
        drawing.set(title=f"{self.choice.family}, {self.choice.nbytes:,} bytes")
        return figure


def _draw_measured(axes: Axes, measured: Sequence[Found], front: Sequence[Found], choice: Found) -> None:
    """Bytes and errors of everything measured, by families, the front and the network of choice."""
    for number, family in enumerate(sorted({item.family for item in measured})):
        mine = [item for item in measured if item.family == family]
        axes.scatter([i.nbytes for i in mine], [i.error for i in mine], label=family, color=f"C{number}")
    axes.plot([i.nbytes for i in front], [i.error for i in front], color="0.6", zorder=0)
    axes.scatter([choice.nbytes], [choice.error], s=140, facecolors="none", edgecolors="k")
    axes.set(xscale="log", xlabel="stored bytes", ylabel="relative error", title="measured networks")
    if all(item.error > 0 for item in measured):
        axes.set_yscale("log")
    axes.legend(fontsize=8)


def _draw_network(axes: Axes, network: TensorNetwork) -> None:
    """Cores with the axes whose digits they hold, and the ranks of their bonds."""
    term = network.spec.terms[0]
    graph = term.topology.graph()
    sizes, owners = term.layout.dims, term.layout.position_axes
    labels = {c: "\n".join(f"axis {owners[p]}: {sizes[p]}" for p in graph.nodes[c]["legs"]) for c in graph}
    at = nx.kamada_kawai_layout(graph) if len(graph) > 1 else {0: (0.0, 0.0)}
    nx.draw_networkx(graph, at, labels=labels, ax=axes, node_size=900, node_color="#cfe3ff", font_size=7)
    bonds = {(a, b): str(term.ranks[data["bond"]]) for a, b, data in graph.edges(data=True)}
    nx.draw_networkx_edge_labels(graph, at, edge_labels=bonds, ax=axes, font_size=7)
    axes.axis("off")
