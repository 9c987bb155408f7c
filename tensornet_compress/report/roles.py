"""Which measure of a result is a size, which a quality and which a time, and the groups of rows that compare."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from tensornet_compress.report.numbers import number
from tensornet_compress.report.schema import Measure, Result, Row, Task

SIZES = (
    "total_nbytes",
    "targeted_nbytes",
    "nbytes",
    "held_nbytes",
    "bytes",
    "kilotoken_nbytes",
    "bits_per_element",
    "bits_per_weight",
    "payload_bits_per_element",
    "bits",
    "ratio",
)
QUALITIES = (
    "kl",
    "kl_natural",
    "natural_kl",
    "kl_copy",
    "copy_kl",
    "divergence",
    "perplexity",
    "error",
    "relative_error",
    "predicted_error",
)
BASELINES = ("original_nbytes", "exact_nbytes", "dense_nbytes")
_TIME_UNITS = re.compile(
    r"^((s|ms|us|µs|min|h|seconds?|minutes?|milliseconds?)( ?/.*| per .*)?|.* ?(/ ?|per )(s|sec|second))$", re.IGNORECASE
)
_TIME_NAMES = re.compile(r"(^|_)(seconds|ms|speed|speedup|time|latency|throughput|tokens_s|s)($|_)")
_SIZE_UNITS = re.compile(r"^(bytes?|b|bits?( |/|$).*)$", re.IGNORECASE)
TASKS: dict[Task, str] = {
    "weights": "Weights",
    "kv": "KV cache",
    "search": "Layout search",
    "speed": "Speed",
}


def is_time(name: str, measure: Measure) -> bool:
    """Seconds, rates per second, and ratios of these."""
    return bool(_TIME_UNITS.search(measure.unit.strip()) or _TIME_NAMES.search(name))


def is_size(name: str, measure: Measure) -> bool:
    """Bytes, bits per something, and shares of bytes."""
    if is_time(name, measure):
        return False
    return name in SIZES or name in BASELINES or bool(_SIZE_UNITS.match(measure.unit.strip())) or "nbytes" in name


def is_quality(name: str, measure: Measure) -> bool:
    """What is better in one direction and neither a size nor a time; a gain is a ratio of sizes."""
    return measure.better is not None and "gain" not in name and not is_size(name, measure) and not is_time(name, measure)


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
    names = [name for name in result.measures if any(usable(row, name) for row in rows)]
    measures = {name: result.measures[name] for name in names}
    sizes = [name for name in names if is_size(name, measures[name]) and name not in BASELINES]
    qualities = [name for name in names if is_quality(name, measures[name])]
    return Group(
        task=task,
        subject=subject,
        rows=tuple(rows),
        size=_most_told(sizes, SIZES, rows) if task != "speed" else None,
        qualities=tuple(sorted(qualities, key=lambda name: (_place(name, QUALITIES), names.index(name)))),
        times=tuple(name for name in names if is_time(name, measures[name])),
        measures=measures,
    )


def _most_told(names: Iterable[str], preferred: Sequence[str], rows: Sequence[Row]) -> str | None:
    """The measure that most rows have; of those alike, the preferred one."""
    ranked = sorted(names, key=lambda name: (-sum(usable(row, name) for row in rows), _place(name, preferred)))
    return ranked[0] if ranked else None


def _place(name: str, preferred: Sequence[str]) -> int:
    return preferred.index(name) if name in preferred else len(preferred)


def baseline_nbytes(group: Group, row: Row) -> float | None:
    """Bytes before compression, where the row or the group's original tells them or they can be computed."""
    for name in BASELINES:
        if usable(row, name) and row.values[name] > 0:
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
