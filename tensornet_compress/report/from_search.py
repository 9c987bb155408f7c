"""What a search of one tensor found, as a result."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from pydantic import JsonValue

from tensornet_compress.report.drawing_of import drawing_of
from tensornet_compress.report.made import made_here
from tensornet_compress.report.schema import Measure, Result, Row, Spectrum
from tensornet_compress.searching import Found, SearchResult

MEASURES = {
    "nbytes": Measure(title="Stored bytes", unit="bytes", better="lower", explanation="Cores, scales, zero points and orders."),
    "dense_nbytes": Measure(title="The tensor in fp32", unit="bytes"),
    "error": Measure(title="Relative error", better="lower"),
    "gain": Measure(title="Gain of ordering", explanation="Best without any ordering over best with it; 1 means no gain."),
    "null_gain": Measure(title="Gain on shuffled entries", explanation="The null control: what luck alone gains."),
    "seconds": Measure(title="Search time", unit="s", better="lower"),
}  # fmt: skip
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
    within the limit, and the front."""
    limit = _Limit(max_error, max_bytes)
    rows = [_choice(found, subject, shape, limit)]
    for name, item in limit.best(found).items():
        rows.append(_other(item, name, subject, limit.budget, limit.unit))
    known = {(row.method, row.values["error"]) for row in rows}
    for item in found.pareto:
        if (_name(item), item.error) not in known:
            rows.append(_other(item, _name(item), subject, item.error, "error reached"))
    if found.entry_sort is not None:
        values = {"nbytes": found.entry_sort.nbytes, "error": found.entry_sort.error}
        note = "a figure to compare with: it cannot be stored as a network"
        rows.append(Row(task="search", subject=subject, method="entry sort", values=values, note=note))
    settings: dict[str, JsonValue] = {
        "limit": found.limit,
        "shape": list(shape),
        "networks measured": len(found.found),
        "unfoldings": found.unfoldings,
        "finished": found.finished,
    }
    return made_here(f"Layout search of {subject}", command, MEASURES, rows, settings, found.seconds)


@dataclass(frozen=True)
class _Limit:
    """What the search had to keep."""

    max_error: float | None
    max_bytes: int | None

    @property
    def budget(self) -> float | None:
        return self.max_error if self.max_bytes is None else self.max_bytes

    @property
    def unit(self) -> str:
        return "relative error" if self.max_bytes is None else "bytes"

    def best(self, found: SearchResult) -> dict[str, Found]:
        """By name, the fewest bytes that keep the error, or the least error that keeps the bytes."""
        best: dict[str, Found] = {}
        for item in found.found:
            if self.max_bytes is not None and item.nbytes > self.max_bytes:
                continue
            if self.max_error is not None and item.error > self.max_error:
                continue
            name = _name(item)
            if name not in best or self._key(item) < self._key(best[name]):
                best[name] = item
        return best

    def _key(self, item: Found) -> tuple[float, float]:
        return (item.error, item.nbytes) if self.max_bytes is not None else (item.nbytes, item.error)


def _name(item: Found) -> str:
    return f"{item.family}, ordered" if item.ordered else item.family


def _choice(found: SearchResult, subject: str, shape: Sequence[int], limit: _Limit) -> Row:
    values: dict[str, float] = {
        "nbytes": found.best.nbytes,
        "dense_nbytes": prod(shape) * _FP32,
        "error": found.error,
        "gain": found.gain,
        "seconds": found.seconds,
    }
    if found.null is not None:
        values["null_gain"] = found.null.gain
    title = f"{found.choice.family}, {found.best.nbytes:,} bytes: {found.best.spec.describe()}"
    return Row(
        task="search",
        subject=subject,
        method=OURS,
        ours=True,
        budget=limit.budget,
        budget_unit=limit.unit,
        values=values,
        note=f"{found.choice.family}{', ordered' if found.choice.ordered else ''}: {found.reason}",
        ledger=_ledger(found),
        spectra=_spectra(found),
        drawings=(drawing_of(title, found.best.spec),),
    )


def _other(item: Found, name: str, subject: str, budget: float | None, unit: str) -> Row:
    """Families in native order are what anyone would try first; an ordered one is the search's own work."""
    values = {"nbytes": item.nbytes, "error": item.error}
    return Row(
        task="search",
        subject=subject,
        method=name,
        ours=item.ordered,
        budget=budget,
        budget_unit=unit,
        values=values,
        note=item.network.spec.describe(),
    )


def _ledger(found: SearchResult) -> dict[str, int]:
    parts: dict[str, int] = {}
    for place, term in enumerate(found.best.spec.terms):
        prefix = f"term {place} " if len(found.best.spec.terms) > 1 else ""
        for core, size in enumerate(term.core_nbytes):
            parts[f"{prefix}core {core}"] = size
        if term.layout.order_nbytes:
            parts[f"{prefix}orders"] = term.layout.order_nbytes
    return parts


def _spectra(found: SearchResult) -> tuple[Spectrum, ...]:
    before, after = found.spectra.get("native"), found.spectra.get("best")
    if not before or not after:
        return ()
    largest = max(*before, *after) or 1.0
    sides = (tuple(value / largest for value in side) for side in (before, after))
    return (Spectrum(title="Singular values of the widest cut", before=next(sides), after=next(sides)),)
