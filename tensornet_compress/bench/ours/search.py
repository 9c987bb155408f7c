"""``tnc.search`` as a benchmark method, and the best dense form as its floor."""

from __future__ import annotations

from tensornet_compress.bench.search_case import SEARCH_METHODS, SearchCase, SearchMethod, Stored
from tensornet_compress.bench.side import Unavailable
from tensornet_compress.report import Spectrum
from tensornet_compress.report.made import drawing_of
from tensornet_compress.searching import SearchResult, search


def searched(case: SearchCase) -> Stored:
    """Layout, order, topology, ranks and formats; with the null control."""
    result = search(case.tensor, max_error=case.max_error, time_budget=case.seconds, seed=case.seed)
    values = {"gain": result.gain}
    if result.null is not None:
        values["null_gain"] = result.null.gain
    return Stored(
        result.best.nbytes,
        result.error,
        result.reason if result.finished else f"{result.reason}; the time budget ended the search before its end",
        values,
        {"family": result.choice.family, "ordered": result.choice.ordered, "finished": result.finished},
        (drawing_of(result.choice.describe(), result.best.spec),),
        spectra(result),
    )


def spectra(result: SearchResult) -> tuple[Spectrum, ...]:
    """The widest cut in native order and in the best one, where both are known."""
    before, after = result.spectra.get("native"), result.spectra.get("best")
    if not before or not after:
        return ()
    return (Spectrum(title="widest cut", before=tuple(before), after=tuple(after)),)


def dense(case: SearchCase) -> Stored:
    """One core in the cheapest number format that keeps the error."""
    result = search(
        case.tensor, max_error=case.max_error, topologies=("dense",), orderings=(), null=False, time_budget=case.seconds
    )
    kept = [found for found in result.found if found.error <= case.max_error]
    if not kept:
        raise Unavailable("no number format keeps the error")
    best = min(kept, key=lambda found: found.nbytes)
    return Stored(best.nbytes, best.error, settings={"format": best.network.spec.describe()})


SEARCH_METHODS.add(SearchMethod("ours", searched, ours=True, explanation="searched layout, order, topology, ranks and formats"))
SEARCH_METHODS.add(SearchMethod("dense", dense, explanation="one core in the cheapest number format that keeps the error"))
