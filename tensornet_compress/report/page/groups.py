"""Rows that compare with each other, and who of them is best at equal bytes: ours or a peer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import inf, isfinite
from typing import Literal

from tensornet_compress.report.page.numbers import number
from tensornet_compress.report.schema import Measure, Result, Role, Row, Task

TASKS: dict[Task, str] = {"weights": "Weights", "kv": "KV cache", "search": "Layout search", "speed": "Speed"}
PREFERRED = (
    *("targeted_nbytes", "nbytes", "held_nbytes", "kilotoken_nbytes"),
    *("kl", "kl_natural", "kl_copy", "divergence", "perplexity", "error", "predicted_error"),
)
"""Measures that charts and comparisons take before others of the same role."""
_SAME_SIZE = 1.01
_EVEN = 0.02
_MOST_DUELS = 8


def usable(row: Row, name: str | None) -> bool:
    """Whether a row has a finite value of a measure."""
    return name is not None and isfinite(row.values.get(name, inf))


def is_divergence(name: str) -> bool:
    """Whether a measure tells how far predictions moved, so that 0 means not at all."""
    return "kl" in name or "divergence" in name


@dataclass(frozen=True)
class Group:
    """Rows of one task on one subject, which compare with each other. ``size``: measure of its size axis (``None``: none)."""

    task: Task
    subject: str
    rows: tuple[Row, ...]
    size: str | None
    qualities: tuple[str, ...]
    times: tuple[str, ...]
    measures: dict[str, Measure]

    @property
    def quality(self) -> str | None:
        """The quality that comparisons speak of."""
        return self.qualities[0] if self.qualities else None

    @property
    def ours(self) -> list[Row]:
        """Rows that this package made by its own search and allocation."""
        return [row for row in self.rows if row.ours]

    @property
    def peers(self) -> list[Row]:
        """The other rows that compete, which an uncompressed original does not."""
        return [row for row in self.rows if not row.ours and row is not self.original]

    @property
    def rivals(self) -> list[Row]:
        """Ours and the peers."""
        return [*self.ours, *self.peers]

    @cached_property
    def original(self) -> Row | None:
        """The row of the model or cache before compression: the largest, if it has no budget and is not ours."""
        sized = [row for row in self.rows if usable(row, self.size)]
        if self.size is None or self.task not in ("weights", "kv") or len(sized) < 2:
            return None
        largest = max(sized, key=lambda row: row.values[self.size or ""])
        return largest if largest.budget is None and not largest.ours else None

    def best(self, name: str, rows: Iterable[Row]) -> Row | None:
        """The row with the best value of a measure; of those alike, the first."""
        sign = -1 if self.measures[name].better == "higher" else 1
        return min((row for row in rows if usable(row, name)), key=lambda row: sign * row.values[name], default=None)

    def nbytes_before(self, row: Row) -> float | None:
        """Bytes before compression, if the row or the group's original tells them or they can be computed."""
        for name, measure in self.measures.items():
            if measure.role == "before" and usable(row, name) and row.values[name] > 0:
                return row.values[name]
        if usable(row, "ratio") and usable(row, "nbytes") and row.values["ratio"] > 0:
            return row.values["nbytes"] / row.values["ratio"]
        return self.original.values["nbytes"] if self.original is not None and usable(self.original, "nbytes") else None


def groups(result: Result) -> list[Group]:
    """Groups in the order of tasks, then of first appearance; skipped rows belong to none."""
    rows: dict[tuple[Task, str], list[Row]] = {}
    for row in result.rows:
        if row.skipped is None:
            rows.setdefault((row.task, row.subject), []).append(row)
    return [_group(result, *key, rows[key]) for task in TASKS for key in rows if key[0] == task]


def _group(result: Result, task: Task, subject: str, rows: Sequence[Row]) -> Group:
    measures = {name: measure for name, measure in result.measures.items() if any(usable(row, name) for row in rows)}

    def of(role: Role) -> list[str]:
        names = [name for name, measure in measures.items() if measure.role == role]
        return sorted(names, key=lambda name: PREFERRED.index(name) if name in PREFERRED else len(PREFERRED))

    # The size that most rows have; of those alike, the preferred one.
    size = max(of("size"), key=lambda name: sum(usable(row, name) for row in rows), default=None) if task != "speed" else None
    return Group(task, subject, tuple(rows), size, tuple(of("quality")), tuple(of("time")), measures)


def fewer(rows: Sequence[Row], most: int, budget: float | None) -> list[Row]:
    """At most so many rows: when there are more, those of one budget, so that methods stay comparable."""
    if len(rows) > most:
        rows = [row for row in rows if row.budget == budget] or rows
    return list(rows[:most])


def label(row: Row) -> str:
    """A method with its budget, as a table names a row."""
    return row.method if row.budget is None else f"{row.method}, {number(row.budget, 3)} {row.budget_unit}".strip()


@dataclass(frozen=True)
class Duel:
    """The best of ours and the best peer under one limit: ``by`` is the measure that decides, ``limit_on`` the measure that the
    limit holds for (``None``: the error allowed, as the rows' budget says)."""

    group: Group
    by: str
    limit: float
    limit_on: str | None
    ours: Row
    peer: Row

    @property
    def measure(self) -> Measure:
        """What decides."""
        return self.group.measures[self.by]

    @property
    def factor(self) -> float:
        """Peer's value over ours (or the inverse where higher is better): above 1, ours is better."""
        mine, other = self._values if self.measure.better != "higher" else self._values[::-1]
        if mine == other:
            return 1.0
        return other / mine if mine > 0 else inf

    @property
    def winner(self) -> Literal["ours", "peer", "even"]:
        """Who wins; within two percent nobody does."""
        if isfinite(self.factor) and abs(self.factor - 1) <= _EVEN:
            return "even"
        ours, peer = self._values
        return "ours" if (ours > peer) == (self.measure.better == "higher") else "peer"

    @property
    def lossless(self) -> bool:
        """Whether the winner diverges by no more than the original does from itself by rounding."""
        return self.winner != "even" and min(self._values) <= self._floor

    @property
    def _floor(self) -> float:
        original = self.group.original
        return abs(original.values.get(self.by, 0.0)) if original is not None and is_divergence(self.by) else -inf

    @property
    def _values(self) -> tuple[float, float]:
        """Of ours and the peer; a divergence is no less than what the original shows against itself by rounding alone."""
        return max(self.ours.values[self.by], self._floor), max(self.peer.values[self.by], self._floor)


def duels(group: Group) -> list[Duel]:
    """The duels of a group, from the smallest limit up; empty without both ours and peers."""
    if group.size is None or not group.ours or not group.peers:
        return []
    if group.task == "search" and not any(row.budget_unit == "bytes" for row in group.ours):
        return _at_equal_error(group, group.size)
    return [] if group.quality is None else _at_equal_size(group, group.size, group.quality)


def _at_equal_error(group: Group, size: str) -> list[Duel]:
    """Fewest bytes of either side among the rows that were given the same limit."""
    made = []
    for budget in sorted({row.budget for row in group.rivals if row.budget is not None}):
        sides = ((row for row in side if row.budget == budget) for side in (group.ours, group.peers))
        ours, peer = (group.best(size, side) for side in sides)
        if ours is not None and peer is not None:
            made.append(Duel(group, size, budget, None, ours, peer))
    return made


def _at_equal_size(group: Group, size: str, quality: str) -> list[Duel]:
    """Best quality of either side among the rows that take no more than each size that was measured."""
    rows = [row for row in group.rivals if usable(row, size) and usable(row, quality)]
    made: list[Duel] = []
    for limit in _levels(row.values[size] for row in rows):
        fitting = [row for row in rows if row.values[size] <= limit]
        ours, peer = (group.best(quality, (row for row in fitting if row.ours == side)) for side in (True, False))
        if ours is not None and peer is not None and not (made and (made[-1].ours, made[-1].peer) == (ours, peer)):
            made.append(Duel(group, quality, limit, size, ours, peer))
    if len(made) <= _MOST_DUELS:
        return made
    return [made[round(place * (len(made) - 1) / (_MOST_DUELS - 1))] for place in range(_MOST_DUELS)]


def _levels(sizes: Iterable[float]) -> list[float]:
    """Sizes in rising order, those that are alike taken together at their largest."""
    levels: list[float] = []
    for size in sorted(sizes):
        if levels and size <= levels[-1] * _SAME_SIZE:
            levels.pop()
        levels.append(size)
    return levels
