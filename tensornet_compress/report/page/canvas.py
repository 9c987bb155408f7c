"""matplotlib figures as inline SVG: drawn for two widths, coloured by the style sheet, with nothing from outside.

matplotlib draws with a stand-in for each colour of the style sheet; the finished SVG refers to the CSS variable instead, so
that one picture serves both colour schemes.
"""

from __future__ import annotations

import hashlib
import io
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from markupsafe import Markup

from tensornet_compress.report.page.numbers import amount, is_bytes, plain, significant
from tensornet_compress.report.page.parts import Chart, Key
from tensornet_compress.report.schema import Measure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

OURS = ("ours-1", "ours-2", "ours-3", "ours-4")
PEERS = ("peer-1", "peer-2", "peer-3", "peer-4", "peer-5", "peer-6", "peer-7", "peer-8")
INKS = ("ink", "muted", "line", "card", "before", "after", "keys", "values", "node", *OURS, *PEERS)
_STAND_INS = {name: f"#f00d{number:02x}" for number, name in enumerate(INKS)}
_INCH = 72
_REFERENCE = re.compile(r"url\(#|^#")
_ZEROS = re.compile(r"(?<=\d)\.0+ |(?<=\.\d)0 ")


def colour(name: str) -> str:
    """The stand-in for a colour of the style sheet."""
    return _STAND_INS[name]


@dataclass(frozen=True)
class Canvas:
    """The width in pixels that a chart is drawn for; text is shown in the size that it is drawn in."""

    width: int
    text: float

    @property
    def narrow(self) -> bool:
        """Whether this is the width of a phone."""
        return self.width < 600

    def axes(self, height: float) -> tuple[Figure, Axes]:
        """An empty figure, ``height`` pixels high, and its axes."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(self.width / _INCH, height / _INCH), layout="constrained")
        return figure, figure.add_subplot()


WIDE, NARROW = Canvas(900, 12.0), Canvas(330, 11.0)


def chart(
    title: str, description: str, draw: Callable[[Canvas], Figure], legend: tuple[Key, ...] = (), note: str = ""
) -> Chart:
    """What ``draw`` draws, once for each width."""
    title, description = plain(title), plain(description)
    wide, narrow = (_rendered(canvas, draw, title, description) for canvas in (WIDE, NARROW))
    return Chart(title, description, wide, narrow, legend, note)


def _rendered(canvas: Canvas, draw: Callable[[Canvas], Figure], title: str, description: str) -> Markup:
    import matplotlib

    with matplotlib.rc_context(_settings(canvas)), warnings.catch_warnings():
        # Text stays text, so a glyph that matplotlib's own font lacks is found by the browser.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        buffer = io.BytesIO()
        draw(canvas).savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = _inline(buffer.getvalue(), title, description)
    for name, stand_in in _STAND_INS.items():
        svg = svg.replace(stand_in, f"var(--{name})")
    return Markup(svg)


def _inline(svg: bytes, title: str, description: str) -> str:
    """An SVG file as an element of a page: no namespaces, no fixed size, ids of its own, a title that is read out."""
    prefix = "c" + hashlib.sha256(svg + title.encode()).hexdigest()[:10]
    root = ElementTree.fromstring(svg)
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        for name, value in list(element.attrib.items()):
            del element.attrib[name]
            local = name.rpartition("}")[2]
            own = f"{prefix}-{value}" if local == "id" else _REFERENCE.sub(lambda found: f"{found[0]}{prefix}-", value)
            element.set(local, own)
    for part in root.findall("metadata"):
        root.remove(part)
    for name in ("width", "height", "version"):
        root.attrib.pop(name, None)
    root.attrib |= {"role": "img", "aria-labelledby": f"{prefix}-title {prefix}-desc"}
    for place, (tag, text) in enumerate((("title", title), ("desc", description))):
        part = ElementTree.Element(tag, {"id": f"{prefix}-{tag}"})
        part.text = text
        root.insert(place, part)
    return ElementTree.tostring(root, encoding="unicode")


def _settings(canvas: Canvas) -> dict[Any, Any]:
    """matplotlib's settings: text as text, in one size, and plain lines in the colours of the page."""
    ink, muted, line = colour("ink"), colour("muted"), colour("line")
    off = ("text.parse_math", "axes.formatter.use_mathtext", "axes.unicode_minus", "axes.spines.top", "axes.spines.right")
    sizes = ("font.size", "axes.titlesize", "axes.labelsize", "xtick.labelsize", "ytick.labelsize")
    lines = ("axes.edgecolor", "grid.color", "xtick.color", "ytick.color")
    return {
        "svg.fonttype": "none",
        "svg.hashsalt": "tensornet_compress",
        "font.family": "DejaVu Sans",
        "axes.axisbelow": True,
        "axes.grid": True,
        "grid.linewidth": 0.7,
        **dict.fromkeys(off, False),
        **dict.fromkeys(sizes, canvas.text),
        **dict.fromkeys(lines, line),
        **dict.fromkeys(("text.color", "axes.titlecolor"), ink),
        **dict.fromkeys(("axes.labelcolor", "xtick.labelcolor", "ytick.labelcolor"), muted),
    }


def tick(value: float, measure: Measure | None = None) -> str:
    """A number beside an axis."""
    if measure is not None and is_bytes(measure):
        return _ZEROS.sub(" ", amount(value))
    if abs(value) >= 1e6:
        return f"{tick(value / 1e6)} M"
    mantissa, e, power = significant(value, 6 if abs(value) >= 100 else 3).partition("e")
    return (mantissa.rstrip("0").rstrip(".") if "." in mantissa else mantissa) + e + power


def scale(axis: Axis, values: Sequence[float], measure: Measure | None = None, most: int = 6) -> None:
    """Plain tick labels of one axis, and a logarithmic scale where positive values differ so much that most would lie on it;
    without values, whole numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    spread = max(values) / min(values) if values and min(values) > 0 else 1.0
    if 15 < spread < inf:
        axis._set_axes_scale("log")  # type: ignore[attr-defined]
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if spread < 200 else (1.0,), numticks=12))
        axis.set_minor_formatter(NullFormatter())
    else:
        axis.set_major_locator(MaxNLocator(most, integer=not values))
    axis.set_major_formatter(FuncFormatter(lambda value, _: tick(value, measure)))
