"""matplotlib figures as inline SVG: two widths, colours from the style sheet, its own names, nothing from outside."""

from __future__ import annotations

import hashlib
import io
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from markupsafe import Markup

from tensornet_compress.errors import MissingExtraError
from tensornet_compress.report.charts.palette import colour, with_variables
from tensornet_compress.report.parts import Chart, Key

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_INCH = 72
_REFERENCES = re.compile(r"url\(#([^)]*)\)")


@dataclass(frozen=True)
class Canvas:
    """The width in pixels that a chart is drawn for; text is shown in the size that it is drawn in."""

    name: str
    width: int
    text: float

    @property
    def narrow(self) -> bool:
        """Whether this is the width of a phone."""
        return self.name == "narrow"

    def figure(self, height: float) -> Figure:
        """An empty figure, ``height`` pixels high."""
        from matplotlib.figure import Figure

        return Figure(figsize=(self.width / _INCH, height / _INCH), layout="constrained")


WIDE = Canvas("wide", 900, 12.0)
NARROW = Canvas("narrow", 330, 11.0)


def need_matplotlib() -> None:
    """Refuse early and in one line where charts cannot be drawn."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise MissingExtraError("reports need matplotlib; run: python -m pip install 'tensornet-compress[report]'") from error


def chart(
    title: str, description: str, draw: Callable[[Canvas], Figure], legend: tuple[Key, ...] = (), note: str = ""
) -> Chart:
    """Draw once for each width."""
    wide, narrow = (_rendered(canvas, draw, title, description) for canvas in (WIDE, NARROW))
    return Chart(title, description, wide, narrow, legend, note)


def _rendered(canvas: Canvas, draw: Callable[[Canvas], Figure], title: str, description: str) -> Markup:
    import matplotlib

    with matplotlib.rc_context(_settings(canvas)), warnings.catch_warnings():
        # Text stays text, so a glyph that matplotlib's own font lacks is found by the browser.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        buffer = io.BytesIO()
        draw(canvas).savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return inline(buffer.getvalue(), title, description)


def inline(svg: bytes, title: str, description: str) -> Markup:
    """An SVG file as an element of a page: no namespaces, no fixed size, its own names, a title that is read out."""
    prefix = "c" + hashlib.sha256(svg + title.encode()).hexdigest()[:10]
    root = ElementTree.fromstring(svg)
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        for name in list(element.attrib):
            value = _REFERENCES.sub(rf"url(#{prefix}-\1)", element.attrib.pop(name))
            local = name.rpartition("}")[2]
            if local == "id":
                value = f"{prefix}-{value}"
            elif local == "href":
                value = value.replace("#", f"#{prefix}-", 1)
            element.set(local, value)
    for child in [part for part in root if part.tag == "metadata"]:
        root.remove(child)
    for name in ("width", "height", "version"):
        root.attrib.pop(name, None)
    root.set("role", "img")
    root.set("aria-labelledby", f"{prefix}-title {prefix}-desc")
    for place, (tag, text) in enumerate((("title", title), ("desc", description))):
        part = ElementTree.Element(tag, {"id": f"{prefix}-{tag}"})
        part.text = text
        root.insert(place, part)
    text = ElementTree.tostring(root, encoding="unicode", short_empty_elements=True)
    return Markup(with_variables(text))


def _settings(canvas: Canvas) -> dict[Any, Any]:
    ink, muted, line = colour("ink"), colour("muted"), colour("line")
    return {
        "svg.fonttype": "none",
        "svg.hashsalt": "tensornet_compress",
        "text.parse_math": False,
        "axes.formatter.use_mathtext": False,
        "axes.unicode_minus": False,
        "font.family": "DejaVu Sans",
        "font.size": canvas.text,
        "axes.titlesize": canvas.text,
        "axes.labelsize": canvas.text,
        "xtick.labelsize": canvas.text,
        "ytick.labelsize": canvas.text,
        "text.color": ink,
        "axes.labelcolor": muted,
        "axes.titlecolor": ink,
        "axes.edgecolor": line,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
        "axes.grid": True,
        "grid.color": line,
        "grid.linewidth": 0.7,
        "xtick.color": line,
        "ytick.color": line,
        "xtick.labelcolor": muted,
        "ytick.labelcolor": muted,
        "path.simplify": True,
    }
