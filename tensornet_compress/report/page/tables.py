"""The sections of plain tables: who is best, what could not run, all figures, and how to make them again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import inf

from tensornet_compress.report.page.groups import TASKS, Duel, Group, duels, label
from tensornet_compress.report.page.headline import limit_words
from tensornet_compress.report.page.numbers import (
    amount,
    is_bytes,
    lower_first,
    moment,
    named,
    number,
    setting,
    short,
    texts,
    times,
    without_unit,
)
from tensornet_compress.report.page.parts import Block, Cell, Code, Section, Table, Terms
from tensornet_compress.report.schema import Measure, Result, Row

_MOST_TABLES = 4
_MOST_SKIPPED = 10
_MOST_OPEN = 12
_TONES = {"ours": "good", "peer": "bad", "even": "even"}


def compare(result: Result, groups: Sequence[Group]) -> Section | None:
    """The best of ours and the best peer under each limit."""
    tables = []
    for task in TASKS:
        mine = [(group, fights) for group in groups if group.task == task and (fights := duels(group))]
        if len(mine) > _MOST_TABLES:
            every = [duel for _, fights in mine for duel in fights]
            tables.append(_duels_table(f"{TASKS[task]}: {len(mine)} subjects", every, subjects=True))
        else:
            tables += [_duels_table(f"{TASKS[task]}: {short(group.subject)}", fights, False) for group, fights in mine]
    return Section("compare", tuple(tables)) if tables else None


def _duels_table(caption: str, fights: Sequence[Duel], subjects: bool) -> Table:
    first = fights[0]
    limit = "error allowed"
    if first.limit_on is not None:
        limit = f"at most, {lower_first(first.group.measures[first.limit_on].title)}"
    better = "higher" if first.measure.better == "higher" else "lower"
    note = f"Compared by {lower_first(named(first.measure))}; {better} is better."
    if any(row.values.get("profile_nbytes") for row in first.group.rivals):
        note += " A profile, stored once for a model, is not in these sizes; see where the bytes are."
    rows = tuple((*((Cell(short(duel.group.subject, 40)),) if subjects else ()), *_duel_cells(duel)) for duel in fights)
    columns = (*(("subject",) if subjects else ()), limit, "ours", "best peer", "wins")
    return Table(caption, columns, rows, note=note)


def _duel_cells(duel: Duel) -> tuple[Cell, ...]:
    factor = max(duel.factor, 1 / duel.factor if duel.factor else inf)
    lead = "" if duel.winner == "even" or factor == inf else f"by {times(factor)} ×"
    sides = []
    for row in (duel.ours, duel.peer):
        value, name = row.values[duel.by], row.method if duel.limit_on is None else label(row)
        sides.append(Cell(without_unit(value, duel.measure), exact=number(value, 10), more=short(name, 36)))
    winner = Cell(duel.winner, tone=_TONES[duel.winner], more="loses nothing" if duel.lossless else lead)
    return (Cell(limit_words(duel)), *sides, winner)


def skipped(result: Result, groups: Sequence[Group]) -> Section | None:
    """What could not run, and why."""
    rows = tuple(
        (Cell(short(label(row))), Cell(f"{TASKS[row.task]}: {short(row.subject, 36)}"), Cell(row.skipped))
        for row in result.rows
        if row.skipped is not None
    )
    table = Table(f"{len(rows)} skipped", ("method", "on", "reason"), rows, folded=len(rows) > _MOST_SKIPPED)
    return Section("skipped", (table,)) if rows else None


def figures(result: Result, groups: Sequence[Group]) -> Section | None:
    """Every measured figure: a table for each subject."""
    folded = sum(len(group.rows) for group in groups) > _MOST_OPEN
    return Section("figures", tuple(_figures(group, folded) for group in groups)) if groups else None


def _figures(group: Group, folded: bool) -> Table:
    arrows = {"lower": " ↓", "higher": " ↑", None: ""}
    columns = ("method", *(named(measure) + arrows[measure.better] for measure in group.measures.values()))
    rows = []
    for row in [row for ours in (True, False) for row in group.rows if row.ours == ours]:
        name = short(label(row)) + (" (ours)" if row.ours and "ours" not in row.method else "")
        values = (_figure(row, key, measure) for key, measure in group.measures.items())
        rows.append((Cell(name, exact=row.note, tone="ours" if row.ours else ""), *values))
    return Table(f"{TASKS[group.task]}: {short(group.subject)} ({len(rows)} rows)", columns, tuple(rows), folded=folded)


def _figure(row: Row, name: str, measure: Measure) -> Cell:
    if name not in row.values:
        return Cell("", True)
    value = row.values[name]
    exact = f"{int(value):,} bytes" if is_bytes(measure) and abs(value) < 1e18 else repr(value)
    exact += f" ± {row.errors[name]:.2g}" if name in row.errors else ""
    return Cell(amount(value) if is_bytes(measure) else number(value), True, exact)


def words(result: Result, groups: Sequence[Group]) -> Section | None:
    """Words that this page uses, each explained once, then what each measure means."""
    rows, known = result.rows, texts()["terms"]
    terms: dict[str, str] = dict(known["always"])
    for task in TASKS:
        terms |= known[task] if any(row.task == task for row in rows) else {}
    if any(row.layers or row.drawings or row.task == "search" for row in rows):
        terms |= known["networks"]
    if any(row.spectra for row in rows):
        terms |= known["spectra"]
    used = {name for row in rows for name in row.values}
    for name, measure in result.measures.items():
        if name in used and measure.explanation:
            unit = f" ({measure.unit})" if measure.unit else ""
            terms[measure.title + unit] = measure.explanation
    return Section("words", (Terms(tuple(terms.items())),))


def reproduce(result: Result, groups: Sequence[Group]) -> Section | None:
    """How to get the same figures again: command, settings, machine, versions and what is special to single rows."""
    machine = result.machine
    threads = f"{machine.threads} thread{'s' if machine.threads != 1 else ''}"
    where = {
        "made": moment(result.made),
        "seconds in all": "" if result.seconds is None else number(result.seconds, 3),
        "this package": result.version + (f", commit {machine.commit[:12]}" if machine.commit else ""),
        "processor": f"{machine.processor}, {machine.cores} cores, {threads}, {machine.device}",
        "Python": machine.python,
    } | machine.packages
    rows = []
    for row in result.rows:
        told = [f"{name}: {setting(value)}" for name, value in row.settings.items()]
        told += [f"seed: {row.seed}"] if row.seed is not None else []
        told += [row.note] if row.note else []
        if told:
            rows.append((Cell(short(label(row))), Cell(short(row.subject, 36)), Cell("; ".join(told))))
    tables = (
        _pairs("Settings", {name: setting(value) for name, value in result.settings.items()}),
        _pairs("Machine and versions", {name: value for name, value in where.items() if value}),
        Table("Settings and notes of single rows", ("method", "on", "settings and notes"), tuple(rows), folded=True),
    )
    blocks: tuple[Block, ...] = (Code("The command", result.command), *(table for table in tables if table.rows))
    return Section("reproduce", blocks)


def _pairs(caption: str, pairs: Mapping[str, str]) -> Table:
    return Table(caption, ("name", "value"), tuple((Cell(name), Cell(value)) for name, value in pairs.items()))
