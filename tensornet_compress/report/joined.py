"""Results held against each other and put together: other methods or sizes of the same benchmark are one result."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import JsonValue

from tensornet_compress.errors import TensorNetError
from tensornet_compress.report.schema import Measure, Result, Row

GROWING = ("methods", "bits")
"""Lists that say which rows there are, not how they were made: results that differ in them alone go together."""


def joined(results: Sequence[Result]) -> Result:
    """One result with the rows of all. Commands are joined by ``&&``; the machine is the first one's.

    Where two runs have the same row, one that was measured counts before one that was skipped; that of the original, in every
    run of one model, counts once.

    Raises:
        TensorNetError: no results, runs of one benchmark with settings other than methods and sizes that differ, or a row
            that two runs measured with different values.
    """
    if not results:
        raise TensorNetError("give at least one result to put together")
    first, *others = results
    settings, measures = first.settings, dict(first.measures)
    rows = {row.key: row for row in first.rows}
    for other in others:
        settings, changed = widened(other.settings | settings, settings | other.settings)
        if changed:
            raise TensorNetError(f"{other.command!r} ran with other settings than {first.command!r}: {'; '.join(changed)}")
        measures |= _new_measures(measures, other)
        for row in other.rows:
            rows[row.key] = _measured(rows.get(row.key), row)
    seconds = [result.seconds for result in results if result.seconds is not None]
    names = list(dict.fromkeys(result.name for result in results))
    return first.model_copy(
        update={
            "name": " + ".join(names),
            "command": " && ".join(result.command for result in results),
            "settings": settings,
            "measures": measures,
            "rows": tuple(rows.values()),
            "seconds": sum(seconds) if seconds else None,
            "complete": all(result.complete for result in results),
        }
    )


def without_peer_layers(result: Result) -> Result:
    """The same without what peers did to each layer; all their values stay."""
    rows = tuple(row if row.ours else row.model_copy(update={"layers": (), "drawings": ()}) for row in result.rows)
    return result.model_copy(update={"rows": rows})


def _new_measures(known: dict[str, Measure], other: Result) -> dict[str, Measure]:
    for name in known.keys() & other.measures.keys():
        if known[name] != other.measures[name]:
            raise TensorNetError(f"{other.command!r} means something else by {name!r}; make it again with this version")
    return other.measures


def _measured(one: Row | None, other: Row) -> Row:
    """The row that counts; times may differ, as the original model's do in runs of different methods."""
    if one is None or one.skipped is not None:
        return other
    values = [{name: value for name, value in row.values.items() if name != "seconds"} for row in (one, other)]
    if other.skipped is None and values[0] != values[1]:
        raise TensorNetError(f"two of the results measured {other.method} on {other.subject} at {other.budget}; leave one out")
    return one


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """Settings that differ, each as ``name: old -> new``."""
    changed = []
    for name in sorted({*old, *new}):
        before, after = old.get(name), new.get(name)
        if isinstance(before, dict) and isinstance(after, dict):
            changed += differences(before, after, f"{prefix}{name}.")
        elif before != after:
            changed.append(f"{prefix}{name}: {_short(before)} -> {_short(after)}")
    return changed


def widened(old: dict[str, JsonValue], new: dict[str, JsonValue]) -> tuple[dict[str, JsonValue], list[str]]:
    """The settings of both runs, with the union of the lists in ``GROWING``; and what else differs, see ``differences``."""
    both: dict[str, JsonValue] = dict(new)
    for name in {*old, *new}:
        before, after = old.get(name), new.get(name)
        if isinstance(before, dict) and isinstance(after, dict):
            lists = {key: (before.get(key), after.get(key)) for key in GROWING}
            unions: dict[str, JsonValue] = {
                key: [*one, *(item for item in other if item not in one)]
                for key, (one, other) in lists.items()
                if isinstance(one, list) and isinstance(other, list)
            }
            both[name], old, new = after | unions, old | {name: before | unions}, new | {name: after | unions}
    return both, differences(old, new)


def _short(value: object) -> str:
    text = "none" if value is None else str(value)
    return text if len(text) <= 60 else text[:57] + "..."
