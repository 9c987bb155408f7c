"""Results of several runs as one: other methods or sizes of the same benchmark, made one after the other or side by side."""

from __future__ import annotations

from collections.abc import Sequence

from tensornet_compress.errors import TensorNetError
from tensornet_compress.report.schema import Measure, Result, Row
from tensornet_compress.report.settings import widened


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
    if one is None or one.skipped is not None:
        return other
    if other.skipped is None and not _alike(one, other):
        raise TensorNetError(f"two of the results measured {other.method} on {other.subject} at {other.budget}; leave one out")
    return one


def _alike(one: Row, other: Row) -> bool:
    """Whether two rows have the same values but for their times, as the original model's have in runs of different methods."""
    values = [{name: value for name, value in row.values.items() if name != "seconds"} for row in (one, other)]
    return values[0] == values[1]
