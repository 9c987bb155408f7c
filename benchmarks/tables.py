"""The one maker of tables: fills README.md and docs/*.md with tables and figures of the committed results.

    python benchmarks/tables.py [--write]

Without ``--write`` it says which documents are stale. Documents hold comments that say what they want. A figure:

    0.04<!-- =FILE | SUBJECT | METHOD | BUDGET | VALUE -->

FILE is a result in benchmarks/results, SUBJECT a part of the row's subject (may be empty), BUDGET a number or ``-``. It keeps
its number of decimals, and ``1-VALUE`` is one minus the value. A table stands between two comments:

    <!-- table FILE rows=method columns=budget values=kl size=bits_per_weight -->
    <!-- /table -->

``rows``: what names a line (``subject``, ``method``, ``budget``, ``note`` or ``settings.NAME``; several by commas).
``columns``: ``values`` (the default: one for each measure in ``values``), or ``budget`` or ``method``, whose cells hold the
``values``. ``subjects``, ``methods``: regular expressions that whole names must match; ``order``: methods in this order, no
others. ``errors=yes``: standard errors behind means over documents or seeds. ``size``: a measure that is put in brackets where
it is 2 % away from the budget; ``best``: a last line, ours over the best peer; ``also=METHOD:VALUE,VALUE`` adds columns of one
method to a table by methods. Rows of several seeds are averaged.
"""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from statistics import mean, stdev

from tensornet_compress.report import Result, Row, read_result

HERE = Path(__file__).parent
DOCUMENTS = (HERE.parent / "README.md", *sorted((HERE.parent / "docs").glob("*.md")))
TABLE = re.compile(r"<!-- table (?P<what>.*?) -->\n(?P<body>.*?)<!-- /table -->", re.DOTALL)
FIGURE = re.compile(r"(?P<shown>-?[\d,]+(?:\.\d+)?)<!-- =(?P<what>[^>]*?) -->")
_EXACT = 1e15


@cache
def load(name: str) -> Result:
    """A committed result."""
    return read_result(HERE / "results" / f"{name}.json")


@dataclass(frozen=True)
class Line:
    """Rows that differ in their seed alone. ``values``: their means, ``None`` where a method could not run; ``errors``: their
    standard errors, over seeds where there are several, or else over documents."""

    row: Row
    subject: str
    values: dict[str, float] | None
    errors: dict[str, float]

    def key(self, name: str) -> str:
        """What a table's line is named by."""
        if name.startswith("settings."):
            return str(self.row.settings.get(name.removeprefix("settings."), ""))
        if name == "subject":
            return self.subject
        if name == "budget":
            unit = self.row.budget_unit.partition("/")[0].replace("relative error", "")
            return "" if self.row.budget is None else f"{self.row.budget:g} {unit}".strip()
        if name == "method":
            return f"**{self.row.method}**" if self.row.ours else self.row.method
        return str(getattr(self.row, name))

    def value(self, name: str) -> float | None:
        """A mean; of ``1-NAME`` one minus it."""
        if self.values is None or name.removeprefix("1-") not in self.values:
            return None
        found = self.values[name.removeprefix("1-")]
        return 1 - found if name.startswith("1-") else found

    def error(self, name: str) -> str:
        """The standard error of a value, as it stands behind it."""
        found = self.errors.get(name.removeprefix("1-"), 0.0)
        return f" ± {found:.1g}" if found else ""


@cache
def lines(name: str) -> list[Line]:
    """A result's rows, seeds put together."""
    groups: dict[tuple[str, str, float | None], list[Row]] = {}
    for row in load(name).rows:
        groups.setdefault((re.sub(r", seed \d+$", "", row.subject), row.method, row.budget), []).append(row)
    made = []
    for (subject, _, _), rows in groups.items():
        ran = [row for row in rows if row.skipped is None]
        shared = [key for key in ran[0].values if all(key in row.values for row in ran)] if ran else []
        means = {key: mean(row.values[key] for row in ran) for key in shared} if ran else None
        errors = rows[0].errors
        if len(ran) > 1:
            errors = {key: stdev(row.values[key] for row in ran) / len(ran) ** 0.5 for key in shared}
        made.append(Line(rows[0], subject, means, errors))
    return made


def shown(value: float) -> str:
    """Three significant digits; whole numbers and those from a hundred on with their separators."""
    if value == int(value) and abs(value) < _EXACT:
        return f"{int(value):,}"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def grid(head: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    return "".join(f"| {' | '.join(cells)} |\n" for cells in [head, ["---"] * len(head), *body])


def table(what: str) -> str:
    """The table that a comment asks for."""
    name, *parts = shlex.split(what)
    options = dict(part.partition("=")[::2] for part in parts)
    keys, values = options.get("rows", "method").split(","), options["values"].split(",")
    chosen = [line for line in lines(name) if _wanted(line, options)]
    if "order" in options:
        places = {method: place for place, method in enumerate(options["order"].split(","))}
        chosen = sorted((line for line in chosen if line.row.method in places), key=lambda line: places[line.row.method])
    if all(line.row.ours for line in chosen):  # nothing to tell apart
        chosen = [replace(line, row=line.row.model_copy(update={"ours": False})) for line in chosen]
    if options.get("columns", "values") == "values":
        errors = "errors" in options
        body = [[*map(line.key, keys), *(_cell(line, [value], errors=errors) for value in values)] for line in chosen]
        return grid([*keys_as_heads(keys), *(_title(name, value) for value in values)], body)
    return _across(name, chosen, keys, values, options)


def _wanted(line: Line, options: dict[str, str]) -> bool:
    names = {"subjects": line.subject, "methods": line.row.method}
    by_budget = options.get("columns") == "budget" or "budget" in options.get("rows", "")
    fits = all(re.fullmatch(options.get(option, ".*"), name) for option, name in names.items())
    return fits and not (by_budget and line.row.budget is None)


def _across(name: str, chosen: list[Line], keys: list[str], values: list[str], options: dict[str, str]) -> str:
    """A column for each budget or method."""
    axis, size = options["columns"], options.get("size")
    columns = {line.key(axis): line.row.budget for line in chosen}
    if axis == "budget":
        columns = dict(sorted(columns.items(), key=lambda item: -(item[1] or 0)))
    body: dict[tuple[str, ...], dict[str, Line]] = {}
    for line in chosen:
        body.setdefault(tuple(map(line.key, keys)), {})[line.key(axis)] = line
    errors = "errors" in options
    told = [[*key, *(_cell(cells.get(column), values, size, errors) for column in columns)] for key, cells in body.items()]
    head = [*keys_as_heads(keys), *columns]
    if "best" in options:
        told.append(
            ["ours / best peer", *[""] * (len(keys) - 1), *(_best(chosen, axis, column, values[0]) for column in columns)]
        )
    if "also" in options:
        method, _, more = options["also"].partition(":")
        head += [_title(name, value) for value in more.split(",")]
        for line, cells in zip(told, body.values()):
            own = next((cell for cell in cells.values() if cell.row.method == method), None)
            line += [_cell(own, [value]) for value in more.split(",")]
    return grid(head, told)


def keys_as_heads(keys: Sequence[str]) -> list[str]:
    """How columns of names are headed."""
    return [key.removeprefix("settings.") for key in keys]


def _cell(line: Line | None, values: Sequence[str], size: str | None = None, errors: bool = False) -> str:
    if line is None:
        return ""
    if line.values is None:
        return "cannot"
    told = [(line.value(value), line.error(value) if errors else "") for value in values]
    text = " / ".join("" if value is None else shown(value) + error for value, error in told)
    stored, budget = line.value(size) if size else None, line.row.budget
    return text + (f" ({stored:.2f})" if stored is not None and budget and abs(stored / budget - 1) >= 0.02 else "")


def _title(name: str, value: str) -> str:
    measure = load(name).measures[value.removeprefix("1-")]
    title = f"1 - {measure.title}" if value.startswith("1-") else measure.title
    return f"{title} ({measure.unit})" if measure.unit in ("s", "bytes", "dB") and "seconds" not in title else title


def _best(chosen: list[Line], axis: str, column: str, value: str) -> str:
    """The least of ours over the least of the peers, and whose that is."""
    here = [(found, line) for line in chosen if line.key(axis) == column and (found := line.value(value)) is not None]
    ours = [found for found, line in here if line.row.ours]
    peers = [(found, line.row.method) for found, line in here if not line.row.ours]
    return f"{min(ours) / min(peers)[0]:.2f} ({min(peers)[1]})" if ours and peers else ""


def figure(what: str, like: str) -> str:
    """A value of one row, with the decimals of ``like``."""
    name, subject, method, budget, value = (part.strip() for part in what.split("|"))
    wanted = None if budget == "-" else float(budget)
    rows = [line for line in lines(name) if (line.row.method, line.row.budget) == (method, wanted) and subject in line.subject]
    found = rows[0].value(value) if len(rows) == 1 else None
    if found is None:
        raise SystemExit(f"<!-- ={what} --> fits {len(rows)} rows, and needs one with the value")
    return f"{found:,.{len(like.partition('.')[2])}f}"


def filled(text: str) -> str:
    """A document with its tables and figures made anew."""

    def tables(match: re.Match[str]) -> str:
        return f"<!-- table {match['what']} -->\n{table(match['what'])}<!-- /table -->"

    def figures(match: re.Match[str]) -> str:
        return f"{figure(match['what'], match['shown'])}<!-- ={match['what']} -->"

    return FIGURE.sub(figures, TABLE.sub(tables, text))


def main() -> int:
    write, stale = "--write" in sys.argv[1:], False
    for path in DOCUMENTS:
        before = path.read_text(encoding="utf-8")
        after = filled(before)
        if after != before:
            stale = not write
            path.write_text(after if write else before, encoding="utf-8")
            print(f"{'wrote' if write else 'stale:'} {path.relative_to(HERE.parent)}")
    return int(stale)


if __name__ == "__main__":
    raise SystemExit(main())
