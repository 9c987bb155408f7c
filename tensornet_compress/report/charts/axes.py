"""What charts share: axes that print plain numbers, logarithmic where the values ask for it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from tensornet_compress.report.numbers import amount, heading, is_bytes, short, significant
from tensornet_compress.report.schema import Measure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis

_WIDE_RANGE = 15.0
_MILLION = 1e6
_ZEROS = re.compile(r"(?<=\d)\.0+ |(?<=\.\d)0 ")


def spread(values: Sequence[float]) -> float:
    """Largest over smallest value, infinite when any is zero or less."""
    if not values:
        return 1.0
    return max(values) / min(values) if min(values) > 0 else float("inf")


def wants_log(values: Sequence[float]) -> bool:
    """Whether positive values differ so much that most would lie on the axis."""
    return _WIDE_RANGE < spread(values) < float("inf")


def tick(value: float, measure: Measure | None = None) -> str:
    """A number beside an axis."""
    if measure is not None and is_bytes(measure):
        return _ZEROS.sub(" ", amount(value))
    if value == 0:
        return "0"
    if abs(value) >= _MILLION:
        return f"{tick(value / _MILLION)} M"
    text = significant(value, 6 if abs(value) >= 100 else 3)
    mantissa, e, power = text.partition("e")
    return (mantissa.rstrip("0").rstrip(".") if "." in mantissa else mantissa) + e + power


def style(axis: Axis, values: Sequence[float], measure: Measure | None = None, most: int = 6) -> None:
    """Scale and plain tick labels of one axis."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    log = wants_log(values)
    if log:
        axis._set_axes_scale("log")  # type: ignore[attr-defined]
        few = spread(values) < 200
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if few else (1.0,), numticks=12))
        axis.set_minor_formatter(NullFormatter())
    else:
        axis.set_major_locator(MaxNLocator(most))
    axis.set_major_formatter(FuncFormatter(lambda value, _: tick(value, measure)))


def named(measure: Measure) -> str:
    """Title and unit of a measure beside an axis."""
    unit = short(measure.unit, 24)
    return short(heading(measure)) + (f" ({unit})" if unit and not is_bytes(measure) else "")


def direction(measure: Measure) -> str:
    """Which way is better, in words."""
    return {"lower": "lower is better", "higher": "higher is better", None: ""}[measure.better]


def bare(axes: Axes) -> None:
    """No frame, ticks or grid."""
    axes.axis("off")
