"""What a search of one tensor found, as a result."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from math import prod
from typing import Any

from pydantic import JsonValue

from tensornet_compress.report.made import drawing_of, made_here
from tensornet_compress.report.schema import Measure, Result, Row, Spectrum
from tensornet_compress.searching import Found, SearchResult

_STORED = "Cores, scales, zero points and orders."
_GAIN = "Best without any ordering over best with it; 1 means no gain."
_NULL_GAIN = "The null control: what luck alone gains."
MEASURES = {
    "nbytes": Measure(title="Stored bytes", unit="bytes", better="lower", role="size", explanation=_STORED),
    "dense_nbytes": Measure(title="The tensor in fp32", unit="bytes", role="before"),
    "error": Measure(title="Relative error", better="lower", role="quality"),
    "gain": Measure(title="Gain of ordering", role="other", explanation=_GAIN),
    "null_gain": Measure(title="Gain on shuffled entries", role="other", explanation=_NULL_GAIN),
    "seconds": Measure(title="Search time", unit="s", better="lower", role="time"),
}
OURS = "the search's choice"
_FP32 = 4


def search_result(
    found: SearchResult,
    subject: str,
    shape: Sequence[int],
    command: str = "",
    max_error: float | None = None,
    max_bytes: int | None = None,
) -> Result:
    """The result of searching ``subject``, a tensor of ``shape``, under one of the limits: the choice, the best of each family
    within the limit, and the front.

    Families in native order are what anyone would try first; an ordered one is the search's own work.
    """
    row = partial(Row, task="search", subject=subject)
    budget, unit = (max_error, "relative error") if max_bytes is None else (max_bytes, "bytes")
    best = _best_of_families(found, max_error, max_bytes)
    rows = [row(budget=budget, budget_unit=unit, **_choice(found, shape))]
    known = {(OURS, found.error)} | {(_name(item), item.error) for item in best}
    front = [item for item in found.pareto if (_name(item), item.error) not in known]
    limits = [(item, budget, unit) for item in best] + [(item, item.error, "error reached") for item in front]
    for item, limit, of in limits:
        values, note = {"nbytes": item.nbytes, "error": item.error}, item.network.spec.describe()
        rows.append(row(method=_name(item), ours=item.ordered, budget=limit, budget_unit=of, values=values, note=note))
    settings: dict[str, JsonValue] = {
        "limit": found.limit,
        "shape": list(shape),
        "networks measured": len(found.found),
        "unfoldings": found.unfoldings,
        "finished": found.finished,
    }
    return made_here(f"Layout search of {subject}", command, MEASURES, rows, settings, found.seconds)


def _name(item: Found) -> str:
    return f"{item.family}, ordered" if item.ordered else item.family


def _best_of_families(found: SearchResult, max_error: float | None, max_bytes: int | None) -> list[Found]:
    """For each family, ordered or not, the fewest bytes that keep the error, or the least error that keeps the bytes."""

    def cost(item: Found) -> tuple[float, float]:
        return (item.error, item.nbytes) if max_bytes is not None else (item.nbytes, item.error)

    best: dict[str, Found] = {}
    for item in found.found:
        fits = (max_bytes is None or item.nbytes <= max_bytes) and (max_error is None or item.error <= max_error)
        if fits and (_name(item) not in best or cost(item) < cost(best[_name(item)])):
            best[_name(item)] = item
    return list(best.values())


def _choice(found: SearchResult, shape: Sequence[int]) -> dict[str, Any]:
    """Fields of the row of what the search chose."""
    spec, nbytes, choice = found.best.spec, found.best.nbytes, found.choice
    ledger: dict[str, int] = {}
    for place, term in enumerate(spec.terms):
        prefix = f"term {place} " if len(spec.terms) > 1 else ""
        ledger |= {f"{prefix}core {core}": size for core, size in enumerate(term.core_nbytes)}
        ledger |= {f"{prefix}orders": term.layout.order_nbytes} if term.layout.order_nbytes else {}
    values = {"nbytes": nbytes, "dense_nbytes": prod(shape) * _FP32, "error": found.error, "gain": found.gain}
    values |= {"seconds": found.seconds} | ({} if found.null is None else {"null_gain": found.null.gain})
    return {
        "method": OURS,
        "ours": True,
        "values": values,
        "note": f"{_name(choice)}: {found.reason}",
        "ledger": ledger,
        "spectra": _spectra(found),
        "drawings": (drawing_of(f"{choice.family}, {nbytes:,} bytes: {spec.describe()}", spec),),
    }


def _spectra(found: SearchResult) -> tuple[Spectrum, ...]:
    before, after = found.spectra.get("native"), found.spectra.get("best")
    if not before or not after:
        return ()
    largest = max(*before, *after) or 1.0
    sides = [tuple(value / largest for value in side) for side in (before, after)]
    return (Spectrum(title="Singular values of the widest cut", before=sides[0], after=sides[1]),)
