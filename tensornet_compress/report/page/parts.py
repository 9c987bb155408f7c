"""What a report page is made of, as plain data that the template lays out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from markupsafe import Markup


@dataclass(frozen=True)
class Key:
    """One entry of a legend: ``mark`` is a character drawn in the colour ``ink``, a name of the style sheet."""

    mark: str
    ink: str
    label: str


@dataclass(frozen=True)
class Chart:
    """One picture in two widths, of which the page shows the one that fits; ``description`` is read out in its place."""

    title: str
    description: str
    wide: Markup
    narrow: Markup
    legend: tuple[Key, ...] = ()
    note: str = ""


@dataclass(frozen=True)
class Cell:
    """A cell of a table. ``exact``: its tooltip. ``tone``: a class of the style sheet. ``more``: a second, smaller line."""

    text: str
    numeric: bool = False
    exact: str = ""
    tone: str = ""
    more: str = ""


@dataclass(frozen=True)
class Table:
    """Rows of cells under the titles ``columns``. ``folded``: closed until it is opened, under ``caption``."""

    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    folded: bool = False
    note: str = ""


@dataclass(frozen=True)
class HeatTable:
    """A grid of layers: blocks by kinds of layer. Each cell has a text and a colour: of ``legend``, or a step of a scale
    that runs between the two labels of ``scale``."""

    caption: str
    kinds: tuple[str, ...]
    blocks: tuple[str, ...]
    cells: tuple[tuple[Cell, ...], ...]
    legend: tuple[Key, ...] = ()
    scale: tuple[str, str] | None = None
    note: str = ""


@dataclass(frozen=True)
class Terms:
    """A list of words and what they mean."""

    terms: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Code:
    """Something to copy, under a caption."""

    caption: str
    text: str


@dataclass(frozen=True)
class Text:
    """A paragraph, or with ``level`` a heading."""

    text: str
    level: int = 0


Block = Chart | Table | HeatTable | Terms | Code | Text


@dataclass(frozen=True)
class Section:
    """One part of the page; its title and what it shows, in plain words, stand in ``words.toml`` under its name."""

    name: str
    blocks: tuple[Block, ...]


@dataclass(frozen=True)
class Claim:
    """One large figure of the headline and what it is."""

    figure: str
    label: str
    tone: Literal["plain", "good", "bad", "even"] = "plain"


@dataclass(frozen=True)
class Story:
    """The headline for one subject: sentences in plain words, and a few large figures."""

    title: str
    sentences: tuple[str, ...]
    claims: tuple[Claim, ...] = ()
