"""A result of what has just been measured here: fills in machine, version and time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import UTC, datetime

from pydantic import JsonValue

from tensornet_compress.report.machine import this_machine
from tensornet_compress.report.schema import Measure, Result, Row
from tensornet_compress.version import __version__


def made_here(
    name: str,
    command: str,
    measures: Mapping[str, Measure],
    rows: Iterable[Row],
    settings: Mapping[str, JsonValue] | None = None,
    seconds: float | None = None,
) -> Result:
    """The result of ``rows``, with those of ``measures`` that they use."""
    kept = tuple(rows)
    used = {value for row in kept for value in row.values}
    return Result(
        name=name,
        command=command,
        version=__version__,
        made=datetime.now(UTC).isoformat(timespec="seconds"),
        machine=this_machine(),
        settings=dict(settings or {}),
        measures={measure: meaning for measure, meaning in measures.items() if measure in used},
        rows=kept,
        seconds=seconds,
    )
