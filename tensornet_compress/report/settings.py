"""Settings of results, held against each other."""

from __future__ import annotations

from typing import Any

from pydantic import JsonValue

GROWING = ("methods", "bits")
"""Lists that say which rows there are, not how they were made: results that differ in them alone go together."""


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """Settings that differ, each as ``name: old -> new``."""
    found = []
    for name in sorted({*old, *new}):
        before, after = old.get(name), new.get(name)
        if isinstance(before, dict) and isinstance(after, dict):
            found += differences(before, after, f"{prefix}{name}.")
        elif before != after:
            found.append(f"{prefix}{name}: {_short(before)} -> {_short(after)}")
    return found


def widened(old: dict[str, JsonValue], new: dict[str, JsonValue]) -> tuple[dict[str, JsonValue], list[str]]:
    """The settings of both runs, with the union of the lists in ``GROWING``; and what else differs, see ``differences``."""
    made: dict[str, JsonValue] = dict(new)
    for name in {*old, *new}:
        before, after = old.get(name), new.get(name)
        if isinstance(before, dict) and isinstance(after, dict):
            lists = {key: (before.get(key), after.get(key)) for key in GROWING}
            unions: dict[str, JsonValue] = {
                key: [*one, *(item for item in other if item not in one)]
                for key, (one, other) in lists.items()
                if isinstance(one, list) and isinstance(other, list)
            }
            made[name], old, new = after | unions, old | {name: before | unions}, new | {name: after | unions}
    return made, differences(old, new)


def _short(value: object) -> str:
    text = "none" if value is None else str(value)
    return text if len(text) <= 60 else text[:57] + "..."
