"""Lines: spectra before and after ordering, and cache bits over layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from tensornet_compress.report.charts.axes import tick
from tensornet_compress.report.charts.palette import colour
from tensornet_compress.report.charts.svg import Canvas, chart
from tensornet_compress.report.numbers import plain, significant
from tensornet_compress.report.parts import Chart, Key
from tensornet_compress.report.schema import BitsOfLayer, Spectrum

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_FLOOR = 1e-7


def spectrum_chart(spectrum: Spectrum, owner: str) -> Chart:
    """Singular values in falling order, before and after."""
    counts = [reach(values) for values in (spectrum.before, spectrum.after)]
    description = (
        f"Singular values above one percent of the largest: {counts[0]} of {len(spectrum.before)} before ordering, "
        f"{counts[1]} of {len(spectrum.after)} after. A line that falls sooner needs fewer numbers."
    )
    keys = (Key("●", "before", "before ordering"), Key("■", "after", "after ordering"))
    return chart(f"{plain(spectrum.title)}: {plain(owner)}", description, lambda canvas: _spectrum(canvas, spectrum), keys)


def reach(values: Sequence[float]) -> int:
    """How many values are above one percent of the largest of both."""
    return sum(value > 0.01 for value in values)


def _spectrum(canvas: Canvas, spectrum: Spectrum) -> Figure:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    figure = canvas.figure(270 if canvas.narrow else 320)
    axes = figure.add_subplot()
    for values, ink, marker, line in ((spectrum.before, "before", "o", "-"), (spectrum.after, "after", "s", "-")):
        shown = [(place, value) for place, value in enumerate(values, 1) if value > _FLOOR]
        size = 5.5 if len(values) <= 40 else 0
        axes.plot(
            [p for p, _ in shown], [v for _, v in shown], color=colour(ink), marker=marker, markersize=size, linestyle=line,
            linewidth=2,
        )  # fmt: skip
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: tick(value)))
    axes.xaxis.set_major_locator(MaxNLocator(5 if canvas.narrow else 9, integer=True))
    axes.set_xlabel("singular value, from the largest down")
    axes.set_title("size, largest = 1", loc="left", color=colour("muted"))
    return figure


def cache_bits_chart(title: str, layers: Sequence[BitsOfLayer]) -> Chart:
    """Bits per number that each layer's keys and values get."""
    keys_mean = sum(layer.keys for layer in layers) / len(layers)
    values_mean = sum(layer.values for layer in layers) / len(layers)
    description = (
        f"{len(layers)} layers; on average {significant(keys_mean)} bits for a number of the keys and "
        f"{significant(values_mean)} for one of the values."
    )
    legend = (Key("■", "keys", "keys"), Key("■", "values", "values"))
    return chart(title, description, lambda canvas: _cache_bits(canvas, layers), legend)


def _cache_bits(canvas: Canvas, layers: Sequence[BitsOfLayer]) -> Figure:
    from matplotlib.ticker import MaxNLocator

    figure = canvas.figure(230 if canvas.narrow else 260)
    axes = figure.add_subplot()
    width = 0.4
    axes.bar([layer.layer - width / 2 for layer in layers], [layer.keys for layer in layers], width, color=colour("keys"))
    axes.bar([layer.layer + width / 2 for layer in layers], [layer.values for layer in layers], width, color=colour("values"))
    axes.xaxis.set_major_locator(MaxNLocator(6 if canvas.narrow else 15, integer=True))
    axes.margins(x=0.01)
    axes.grid(visible=False, axis="x")
    axes.set_xlabel("layer")
    axes.set_title("bits per number", loc="left", color=colour("muted"))
    return figure
