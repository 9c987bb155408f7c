"""The sections that draw: quality against size, bytes, spectra, networks, cache bits and times."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest

from tensornet_compress.report.page.charts import (
    DIRECTIONS,
    byte_bars,
    cache_bits_chart,
    front_chart,
    spectrum_chart,
    value_bars,
)
from tensornet_compress.report.page.groups import TASKS, Group, fewer, label, usable
from tensornet_compress.report.page.headline import featured
from tensornet_compress.report.page.networks import MOST_CORES, network_chart
from tensornet_compress.report.page.numbers import amount, heading, number, short, significant
from tensornet_compress.report.page.parts import Block, Cell, Chart, Section, Table, Text
from tensornet_compress.report.schema import Drawing, Result, Row

_MOST_FRONTS, _MOST_LEDGERS, _MOST_SPECTRA, _MOST_NETWORKS, _MOST_CACHES, _MOST_TIMES = 6, 10, 6, 6, 4, 8
_MOST_VALUES, _MOST_BARS, _MOST_SUBJECTS, _MANY = 12, 16, 24, 4
_FEW_SIZES = 3
_DWARFS = 0.9


def _section(name: str, blocks: Sequence[Block], left: int = 0, what: str = "") -> Section | None:
    """A section, if there is something to show, with a line about what is left out."""
    more = (Text(f"{left} more {what}."),) if left > 0 else ()
    return Section(name, (*blocks, *more)) if blocks else None


def _numbers(caption: str, columns: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> Table:
    """A folded table of numbers, to stand under the picture that was drawn from them."""
    return Table(caption, columns, tuple(tuple(Cell(text, True) for text in row) for row in rows), folded=True)


def fronts(result: Result, groups: Sequence[Group]) -> Section | None:
    """Quality against size: a chart for each subject and each of its first two qualities; of a search at fewer than three
    errors, the bytes as bars for each error."""
    shown: list[list[Chart]] = []
    for group in groups:
        if group.task == "search" and len({row.budget for row in group.rows}) < _FEW_SIZES and group.size is not None:
            charts: Sequence[Chart | None] = _at_equal_error(group, group.size)
        else:
            charts = [front_chart(group, quality) for quality in group.qualities[:2]]
        if drawn := [chart for chart in charts if chart is not None]:
            shown.append(drawn)
    blocks = [chart for charts in shown[:_MOST_FRONTS] for chart in charts]
    what = "subjects are in the table of all figures"
    return _section("fronts", blocks, len(shown) - _MOST_FRONTS, what)


def _at_equal_error(group: Group, size: str) -> list[Chart]:
    """Bars of bytes, the fewest first, for each error that was allowed."""
    charts = []
    measure = group.measures[size]
    for budget in dict.fromkeys(row.budget for row in group.rows if row.budget is not None):
        rows = [row for row in group.rows if row.budget == budget and usable(row, size)]
        items = [(row.method, row.values[size], row.ours) for row in sorted(rows, key=lambda row: row.values[size])]
        title = f"{heading(measure)} at an error of {number(budget, 3)} (lower is better): {group.subject}"
        charts += [value_bars(title, measure, items)] if len(items) > 1 else []
    return charts


def ledger(result: Result, groups: Sequence[Group]) -> Section | None:
    """Where the bytes are: stacked bars of the ledgers of each subject, and the numbers."""
    blocks: list[Block] = []
    for group in groups:
        rows = [row for row in group.rivals if sum(row.ledger.values())]
        if rows:
            title, first = f"{TASKS[group.task]}: {group.subject}", featured(group)
            chosen = fewer(rows, _MOST_LEDGERS, None if first is None else first.budget)
            same = _dominating([row.ledger for row in chosen])
            shown = {label(row): {part: size for part, size in row.ledger.items() if part != same} for row in chosen}
            blocks.append(byte_bars(title, shown))
            if same is not None:
                size = amount(max(row.ledger[same] for row in chosen))
                blocks.append(Text(f"Left out of the bars because it is most of every one: {same}, {size}."))
            blocks.append(_bytes_table(title, rows))
    return _section("ledger", blocks)


def _dominating(ledgers: Sequence[dict[str, int]]) -> str | None:
    """A part that every ledger holds in about the same size and that dwarfs all others."""
    for part in ledgers[0]:
        sizes = [ledger.get(part, 0) for ledger in ledgers]
        shares = [size / sum(ledger.values()) for size, ledger in zip(sizes, ledgers)]
        if min(shares) > _DWARFS and max(shares) < 1 and max(sizes) <= 1.01 * min(sizes):
            return part
    return None


def _bytes_table(title: str, rows: Sequence[Row]) -> Table:
    cells = []
    for row in rows:
        total = sum(row.ledger.values())
        parts = sorted(row.ledger.items(), key=lambda item: (-item[1], item[0]))
        for name, size, tone in (*((short(part), size, "") for part, size in parts), ("all", total, "sum")):
            share = "100 %" if tone else f"{size / total:.1%}"
            numbers = (Cell(amount(size), True, f"{size:,}"), Cell(share, True))
            cells.append((Cell(short(label(row))), Cell(name, tone=tone), *numbers))
    return Table(f"Bytes in numbers, {title}", ("method", "part", "size", "share"), tuple(cells), folded=True)


def spectra(result: Result, groups: Sequence[Group]) -> Section | None:
    """Singular values before and after ordering, with the first of them as numbers."""
    known = [(group, s) for group in groups for row in group.rows for s in row.spectra if s.before or s.after]
    blocks: list[Block] = []
    for group, spectrum in known[:_MOST_SPECTRA]:
        sides = ([number(value, 3) for value in side[:_MOST_VALUES]] for side in (spectrum.before, spectrum.after))
        rows = [(str(place), *pair) for place, pair in enumerate(zip_longest(*sides, fillvalue=""), 1)]
        title = f"First {len(rows)} values, {short(spectrum.title)}"
        blocks += [spectrum_chart(spectrum, group.subject), _numbers(title, ("place", "before", "after"), rows)]
    left = len(known) - _MOST_SPECTRA
    return _section("spectra", blocks, left, "spectra are in the JSON file")


def networks(result: Result, groups: Sequence[Group]) -> Section | None:
    """Networks that were made, drawn: ours first, each picture once, and one plain tensor, which looks like any other."""
    drawings: dict[Drawing, None] = {}
    for group in groups:
        for row in group.rivals:
            drawings |= dict.fromkeys(row.drawings)
    several = [drawing for drawing in drawings if len(drawing.legs) > 1]
    alone = [drawing for drawing in drawings if len(drawing.legs) == 1][:1]
    small = [drawing for drawing in several if len(drawing.legs) <= MOST_CORES] + alone
    blocks = [network_chart(drawing) for drawing in small[:_MOST_NETWORKS]]
    left = len(several) + len(alone) - len(blocks)
    return _section("networks", blocks, left, "networks are in the JSON file")


def cache(result: Result, groups: Sequence[Group]) -> Section | None:
    """Bits of a cache over the layers of the model, for each row that knows them."""
    known = [(group, row) for group in groups for row in group.rivals if row.cache_bits]
    blocks: list[Block] = []
    for group, row in known[:_MOST_CACHES]:
        blocks.append(cache_bits_chart(f"{group.subject}: {label(row)}", row.cache_bits))
        rows = [(str(layer.layer), significant(layer.keys), significant(layer.values)) for layer in row.cache_bits]
        blocks.append(_numbers(f"Bits in numbers, {short(label(row))}", ("layer", "keys", "values"), rows))
    left = len(known) - _MOST_CACHES
    return _section("cache", blocks, left, "are in the JSON file")


def timings(result: Result, groups: Sequence[Group]) -> Section | None:
    """Bars for each time of each subject, or where there are many subjects, one bar of ours for each."""
    charts: list[Chart] = []
    for task in ("speed", "weights", "kv", "search"):
        mine = [group for group in groups if group.task == task]
        for name in dict.fromkeys(name for group in mine for name in group.times) if len(mine) > _MANY else ():
            rows = [(group, row) for group in mine for row in group.ours[:1]]
            charts += _bars_of_time(rows[:_MOST_SUBJECTS], name, f"{TASKS[task]}, ours", by_subject=True)
        for group in mine if len(mine) <= _MANY else ():
            first = featured(group)
            for name in group.times:
                timed = [row for row in group.rivals if usable(row, name) and row.values[name] >= 0]
                rows = [(group, row) for row in fewer(timed, _MOST_BARS, None if first is None else first.budget)]
                charts += _bars_of_time(rows, name, f"{TASKS[task]}, {group.subject}", by_subject=False)
    machine = result.machine
    threads = f"{machine.threads} thread{'s' if machine.threads != 1 else ''}"
    where = f"Measured on {machine.cores} cores ({machine.processor}, {machine.device}) with {threads}."
    blocks: list[Block] = [Text(where), *charts[:_MOST_TIMES]] if charts else []
    return _section("timings", blocks, len(charts) - _MOST_TIMES, "times are in the table of all figures")


def _bars_of_time(rows: Sequence[tuple[Group, Row]], name: str, of: str, by_subject: bool) -> list[Chart]:
    """Bars of one time, named by method or by subject; nothing when all are zero."""
    rows = [(group, row) for group, row in rows if usable(row, name) and row.values[name] >= 0]
    if not any(row.values[name] for _, row in rows):
        return []
    measure = rows[0][0].measures[name]
    better = f" ({DIRECTIONS[measure.better]})" if measure.better else ""
    items = [(group.subject if by_subject else label(row), row.values[name], row.ours) for group, row in rows]
    return [value_bars(f"{heading(measure)}{better}: {of}", measure, items)]
