"""What a report page is made of, as plain data that the template lays out."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from markupsafe import Markup


@dataclass(frozen=True)
class Key:
    """One entry of a legend: ``mark`` is a character drawn in the colour ``ink`` (a name of ``charts.palette``)."""

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
    kind: Literal["chart"] = "chart"


@dataclass(frozen=True)
class Cell:
    """A cell of a table. ``more``: a second, smaller line. ``exact``: its tooltip. ``tone``: a class of the style sheet."""

    text: str
    numeric: bool = False
    exact: str = ""
    tone: str = ""
    more: str = ""


@dataclass(frozen=True)
class Table:
    """``columns``: titles with whether they hold numbers. ``folded``: closed until it is opened, under ``caption``."""

    caption: str
    columns: tuple[tuple[str, bool], ...]
    rows: tuple[tuple[Cell, ...], ...]
    folded: bool = False
    note: str = ""
    kind: Literal["table"] = "table"


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
    kind: Literal["heat"] = "heat"


@dataclass(frozen=True)
class Terms:
    """A list of words and what they mean."""

    terms: tuple[tuple[str, str], ...]
    kind: Literal["terms"] = "terms"


@dataclass(frozen=True)
class Code:
    """Something to copy, under a caption."""

    caption: str
    text: str
    kind: Literal["code"] = "code"


@dataclass(frozen=True)
class Text:
    """A paragraph, or with ``level`` a heading."""

    text: str
    level: int = 0
    kind: Literal["text"] = "text"


Block = Chart | Table | HeatTable | Terms | Code | Text


@dataclass(frozen=True)
class Section:
    """One part of the page: ``lead`` says in plain words what is shown and how to read it."""

    name: str
    title: str
    lead: str
    blocks: tuple[Block, ...]


@dataclass(frozen=True)
class Claim:
    """One thing that the headline says: a large figure, what it is, and the sentence that explains it."""

    figure: str
    label: str
    tone: Literal["plain", "good", "bad", "even"] = "plain"


@dataclass(frozen=True)
class Story:
    """The headline for one subject: sentences in plain words, and a few large figures."""

    title: str
    sentences: tuple[str, ...]
    claims: tuple[Claim, ...] = field(default=())
