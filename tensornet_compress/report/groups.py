"""Groups of rows that compare with each other, and what they are compared by."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from tensornet_compress.report.numbers import number
from tensornet_compress.report.schema import Measure, Result, Role, Row, Task

PREFERRED = (
    *("targeted_nbytes", "nbytes", "held_nbytes", "kilotoken_nbytes"),
    *("kl", "kl_natural", "kl_copy", "divergence", "perplexity", "error", "predicted_error"),
)
"""Measures that charts and comparisons take before others of the same role."""
TASKS: dict[Task, str] = {
    "weights": "Weights",
    "kv": "KV cache",
    "search": "Layout search",
    "speed": "Speed",
}


def usable(row: Row, name: str) -> bool:
    """Whether a row has a finite value of a measure."""
    return name in row.values and math.isfinite(row.values[name])


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
        """The row of the model or cache before compression: the largest without a budget that is not ours."""
        if self.size is None or self.task not in ("weights", "kv"):
            return None
        size = self.size
        sized = [row for row in self.rows if usable(row, size)]
        largest = max(sized, key=lambda row: row.values[size], default=None)
        return largest if largest is not None and largest.budget is None and not largest.ours and len(sized) > 1 else None

    def better(self, name: str, one: float, other: float) -> bool:
        """Whether ``one`` is a better value of a measure than ``other``."""
        return one > other if self.measures[name].better == "higher" else one < other


def groups(result: Result) -> list[Group]:
    """Groups in the order of tasks, then of first appearance; skipped rows belong to none."""
    found: dict[tuple[Task, str], list[Row]] = {}
    for row in result.rows:
        if row.skipped is None:
            found.setdefault((row.task, row.subject), []).append(row)
    order = list(TASKS)
    keys = sorted(found, key=lambda key: order.index(key[0]))
    return [_group(result, task, subject, found[task, subject]) for task, subject in keys]


def _group(result: Result, task: Task, subject: str, rows: Sequence[Row]) -> Group:
    measures = {name: measure for name, measure in result.measures.items() if any(usable(row, name) for row in rows)}

    def of(role: Role) -> list[str]:
        names = [name for name, measure in measures.items() if measure.role == role]
        return sorted(names, key=lambda name: PREFERRED.index(name) if name in PREFERRED else len(PREFERRED))

    # The size that most rows have; of those alike, the preferred one.
    size = max(of("size"), key=lambda name: sum(usable(row, name) for row in rows), default=None) if task != "speed" else None
    return Group(task, subject, tuple(rows), size, tuple(of("quality")), tuple(of("time")), measures)


def baseline_nbytes(group: Group, row: Row) -> float | None:
    """Bytes before compression, where the row or the group's original tells them or they can be computed."""
    for name, measure in group.measures.items():
        if measure.role == "before" and usable(row, name) and row.values[name] > 0:
            return row.values[name]
    if usable(row, "ratio") and usable(row, "nbytes") and row.values["ratio"] > 0:
        return row.values["nbytes"] / row.values["ratio"]
    if group.original is not None and usable(group.original, "nbytes"):
        return group.original.values["nbytes"]
    return None


def fewer(rows: Sequence[Row], most: int, budget: float | None) -> list[Row]:
    """At most so many rows: when there are more, those of one budget, so that methods stay comparable."""
    if len(rows) <= most:
        return list(rows)
    same = [row for row in rows if row.budget == budget]
    return (same or list(rows))[:most]


def label(row: Row) -> str:
    """A method with its budget, as a table names a row."""
    if row.budget is None:
        return row.method
    return f"{row.method}, {number(row.budget, 3)} {row.budget_unit}".strip()
