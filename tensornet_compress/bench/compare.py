"""Two results side by side: old value, new value and their ratio, and which settings differ."""

from __future__ import annotations

from dataclasses import dataclass

from tensornet_compress.report import Result, Row
from tensornet_compress.report.joined import differences


@dataclass(frozen=True)
class Change:
    """One value of one row in both results. ``better``: whether it moved in the better direction, ``None`` where neither is."""

    row: str
    value: str
    old: float
    new: float
    better: bool | None

    @property
    def ratio(self) -> float:
        """New over old; infinite where the old one is zero."""
        return self.new / self.old if self.old else (1.0 if self.new == self.old else float("inf"))


@dataclass(frozen=True)
class Comparison:
    """``changes``: of every value that both have; ``notes``: settings that differ, and rows that only one has."""

    changes: tuple[Change, ...]
    notes: tuple[str, ...]


def compare(old: Result, new: Result) -> Comparison:
    """Row by row, in the order of the new result."""
    before = {row.key: row for row in old.rows}
    changes: list[Change] = []
    notes = [f"settings differ: {text}" for text in differences(old.settings, new.settings)]
    for name in ("processor", "threads", "device"):
        if getattr(old.machine, name) != getattr(new.machine, name):
            notes.append(f"{name} differs: {getattr(old.machine, name)} -> {getattr(new.machine, name)}")
    for row in new.rows:
        known = before.pop(row.key, None)
        if known is None:
            notes.append(f"only in the new result: {title(row)}")
            continue
        if (known.skipped is None) != (row.skipped is None):
            notes.append(f"{title(row)}: {known.skipped or 'measured'} -> {row.skipped or 'measured'}")
        for name, value in row.values.items():
            if name in known.values:
                direction = new.measures[name].better
                better = None
                if direction is not None and value != known.values[name]:
                    better = (value < known.values[name]) == (direction == "lower")
                changes.append(Change(title(row), name, known.values[name], value, better))
    notes += [f"only in the old result: {title(row)}" for row in before.values()]
    return Comparison(tuple(changes), tuple(notes))


def title(row: Row) -> str:
    """What a row is, in one line."""
    size = "" if row.budget is None else f" at {row.budget:g} {row.budget_unit}".rstrip()
    return f"{row.task}: {row.subject}, {row.method}{size}"
