"""The pictures of the README and of docs/scale.md, drawn from committed results.

    python benchmarks/pictures.py

Writes docs/images/file-sizes.svg and docs/images/scale.svg.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter
from tables import HERE, Line, lines, load

IMAGES = HERE.parent / "docs" / "images"
OURS, PEERS, INK, MUTED = "#0b6e4f", ("#b4541a", "#5b5f97", "#8a8d91"), "#1f2933", "#6b7280"
MARKERS = "osD^"
SETTINGS = {
    "svg.fonttype": "none", "svg.hashsalt": "tensornet_compress", "font.family": "sans-serif", "font.size": 11,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": "#e5e7eb", "axes.axisbelow": True,
    "axes.edgecolor": "#9ca3af", "text.color": INK, "axes.labelcolor": MUTED, "xtick.color": MUTED, "ytick.color": MUTED,
}  # fmt: skip
FILES = "bench_model_smollm2"
FAR = 2.0


def file_sizes() -> Figure:
    """What the model loses against the bytes of its file, and how fast it then generates."""
    figure = Figure(figsize=(9, 4.6), layout="constrained")
    axes, measures = figure.add_subplot(), load(FILES).measures
    rows = [line for line in lines(FILES) if line.row.budget is not None and line.values is not None]
    methods = sorted({line.row.method for line in rows}, key=lambda name: (name != "ours", name))
    methods = [name for name in methods if name == "ours" or not name.startswith("ours")]
    for place, name in enumerate(methods):
        points = {point[:2]: point for line in rows if line.row.method == name and (point := _point(line))[1] < FAR}
        told = sorted(points.values())
        ours = name == "ours"
        colour = OURS if ours else PEERS[(place - 1) % len(PEERS)]
        style = {"linewidth": 2.4, "markersize": 8, "zorder": 4} if ours else {"linewidth": 1.3, "markersize": 6, "zorder": 3}
        axes.plot(
            [p[0] for p in told], [p[1] for p in told], color=colour, marker=MARKERS[place % len(MARKERS)], label=name, **style
        )
        for across, up, speed in told:
            if speed:
                where = {"xytext": (0, -16 if ours else 8), "textcoords": "offset points", "ha": "center", "fontsize": 9}
                axes.annotate(f"{speed:.0f}", (across, up), color=colour, **where)
    _plain_logarithms(axes.yaxis)
    axes.set_xlabel("whole file (MB); beside a point: tokens per second on one thread")
    axes.set_title(f"{measures['kl_prose'].title} (nats per token), lower is better", loc="left", fontsize=11)
    axes.legend(frameon=False)
    return figure


def _point(line: Line) -> tuple[float, float, float]:
    nbytes = line.value("file_nbytes") or line.value("nbytes") or 0.0
    return nbytes / 1e6, line.value("kl_prose") or 0.0, line.value("tokens_per_second") or 0.0


def scale() -> Figure:
    """Time and memory of a streamed compression against the weights of the model."""
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    rows = [line for line in lines("scale") if line.subject.startswith("random") and line.row.method == "streamed, one worker"]
    weights = [(line.value("model_nbytes") or 0.0) / 2e6 for line in rows]
    for place, stage in enumerate(("time", "survey", "make", "calibrate")):
        colour = OURS if stage == "time" else PEERS[place - 1]
        left.plot(weights, [line.value(stage) for line in rows], color=colour, marker=MARKERS[place], label=stage)
    right.plot(weights, [(line.value("peak_nbytes") or 0.0) / 1e9 for line in rows], color=OURS, marker="o", label="peak")
    right.plot(weights, [(line.value("model_nbytes") or 0.0) / 1e9 for line in rows], color=MUTED, marker="s", label="model")
    for axes, title in ((left, "seconds"), (right, "GB of memory, and of the model's files")):
        _by_weights(axes, title)
    return figure


def _plain_logarithms(axis: Axis) -> None:
    axis._set_axes_scale("log")  # type: ignore[attr-defined]
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _by_weights(axes: Axes, title: str) -> None:
    _plain_logarithms(axes.xaxis)
    _plain_logarithms(axes.yaxis)
    axes.set_xlabel("weights (millions)")
    axes.set_title(title, loc="left", fontsize=11)
    axes.legend(frameon=False)


PICTURES: dict[str, Callable[[], Figure]] = {"file-sizes": file_sizes, "scale": scale}


def drawn(name: str) -> str:
    """A picture as SVG, the same from the same results."""
    written = io.BytesIO()
    with matplotlib.rc_context(SETTINGS):
        PICTURES[name]().savefig(written, format="svg", facecolor="white", metadata={"Date": None, "Creator": None})
    return written.getvalue().decode()


def path_of(name: str) -> Path:
    return IMAGES / f"{name}.svg"


def main() -> None:
    for name in PICTURES:
        path_of(name).write_text(drawn(name), encoding="utf-8")
        print(path_of(name).name)


if __name__ == "__main__":
    main()
