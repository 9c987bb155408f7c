"""The headline table: the best of ours and the best peer under each limit."""

from __future__ import annotations

from collections.abc import Sequence

from tensornet_compress.report.charts.axes import named
from tensornet_compress.report.groups import TASKS, Group, label
from tensornet_compress.report.headline import limit_words
from tensornet_compress.report.numbers import lower_first, number, plain, short, times, without_unit
from tensornet_compress.report.parts import Cell, Section, Table
from tensornet_compress.report.schema import Result
from tensornet_compress.report.verdict import Duel, duels

_MOST_TABLES = 4
_WINNER = {"ours": ("ours", "good"), "peer": ("peer", "bad"), "even": ("even", "even")}


def compare(result: Result, found: Sequence[Group]) -> Section | None:
    """Who is best at equal bytes."""
    fights = {(group.task, group.subject): duels(group) for group in found}
    tables = []
    for task in TASKS:
        mine = [(group, fights[group.task, group.subject]) for group in found if group.task == task]
        mine = [(group, duelled) for group, duelled in mine if duelled]
        if len(mine) > _MOST_TABLES:
            tables.append(_table(f"{TASKS[task]}: {len(mine)} subjects", [d for _, duelled in mine for d in duelled], True))
        else:
            tables += [_table(f"{TASKS[task]}: {short(group.subject)}", duelled, False) for group, duelled in mine]
    if not tables:
        return None
    lead = (
        "Each line is one limit. Under it stand the best result of ours and the best of any peer; whoever loses less (or, "
        "at equal "
        "error, takes fewer bytes) wins. Within 2 % nobody does."
    )
    return Section("compare", "Who is best at equal bytes", lead, tuple(tables))


def _table(caption: str, fights: Sequence[Duel], subjects: bool) -> Table:
    first = fights[0]
    limit = (
        "error allowed"
        if first.limit_on is None
        else f"at most, {lower_first(plain(first.group.measures[first.limit_on].title))}"
    )
    columns = ((("subject", False),) if subjects else ()) + (
        (limit, False),
        ("ours", False),
        ("best peer", False),
        ("wins", False),
    )
    measure = first.group.measures[first.by]
    note = f"Compared by {lower_first(named(measure))}; {'higher' if measure.better == 'higher' else 'lower'} is better."
    if any(row.values.get("profile_nbytes") for row in first.group.rivals):
        note += " A profile, stored once for a model, is not in these sizes; see where the bytes are."
    rows = tuple(((Cell(short(d.group.subject, 40)),) if subjects else ()) + _cells(d) for d in fights)
    return Table(caption, columns, rows, note=note)


def _cells(duel: Duel) -> tuple[Cell, ...]:
    measure = duel.group.measures[duel.by]
    winner, tone = _WINNER[duel.winner]
    factor = max(duel.factor, 1 / duel.factor if duel.factor else float("inf"))
    by = (
        "loses nothing"
        if duel.lossless
        else ""
        if winner == "even"
        else f"by {times(factor)} ×"
        if factor != float("inf")
        else ""
    )
    sides = (
        Cell(
            without_unit(row.values[duel.by], measure),
            exact=number(row.values[duel.by], 10),
            more=short(row.method if duel.limit_on is None else label(row), 36),
        )
        for row in (duel.ours, duel.peer)
    )
    return (Cell(limit_words(duel)), *sides, Cell(winner, tone=tone, more=by))
