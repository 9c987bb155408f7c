"""The usual formats in native order with our rank rule and number formats: SVD of axes, TT and a balanced tree (HT)."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor

from tensornet_compress.bench.search_case import SEARCH_METHODS, SearchCase, SearchMethod, Stored
from tensornet_compress.bench.side import Unavailable
from tensornet_compress.coding import parse_format
from tensornet_compress.decompose import feasible_ranks, ranks_for_error
from tensornet_compress.options.offered import SEARCH_CORE_FORMATS, fine_digits
from tensornet_compress.options.rounding import rounding_error
from tensornet_compress.searching import SpectrumStore, search
from tensornet_compress.searching.shapes import native_shapes
from tensornet_compress.tensor import TermSpec


def peer(tensor: Tensor, family: Any, error: float) -> dict[str, Any]:
    """The smallest network of one family in native order."""
    result = search(tensor, max_error=error, topologies=(family,), orderings=(), null=False, time_budget=120)
    measured = [(f.nbytes, f.error) for f in result.found if f.family != "dense" and f.error <= error]
    if measured:
        return {"nbytes": min(measured)[0], "error": min(measured)[1], "measured": True}
    predicted = [event.nbytes for event in result.history if event.what.endswith("predicted")]
    return {"nbytes": min(predicted) if predicted else unmerged(tensor, family, error), "measured": False}


def unmerged(tensor: Tensor, family: Any, error: float) -> int | None:
    """Predicted bytes of a network that the search refuses, as one core would hold no more numbers."""
    tensorization = fine_digits(tuple(tensor.shape))
    store = SpectrumStore(tensorization.apply(tensor), precise=False)
    sizes = []
    for shape in native_shapes(tensorization, (family,)):
        layout, topology = shape.laid_out()
        spectra = [store.spectrum(shape.topology.side(bond)) for bond in range(len(topology.edges))]
        for fmt in map(parse_format, SEARCH_CORE_FORMATS):
            allowed = error**2 - rounding_error(fmt) * len(topology.legs)
            if allowed > 0:
                ranks = feasible_ranks(ranks_for_error(spectra, allowed * store.energy, layout, topology), layout, topology)
                formats = (fmt,) * len(topology.legs)
                sizes.append(TermSpec(layout=layout, topology=topology, ranks=tuple(ranks), formats=formats).nbytes)
    return min(sizes, default=None)


def native_order(family: str, case: SearchCase) -> Stored:
    """The smallest measured network of a family; where all are far beyond the dense size, what spectra predict."""
    found = peer(case.tensor, family, case.max_error)
    if found["measured"]:
        return Stored(found["nbytes"], found["error"])
    if found["nbytes"] is None:
        raise Unavailable(f"no {family} network of this tensor keeps the error")
    note = "predicted from spectra, not made: more than 1.3 times the dense size"
    return Stored(found["nbytes"], None, note)


for _name, _family, _explanation in (
    ("svd", "svd", "two cores that cut the axes"),
    ("tt-native", "tt", "tensor train over the digits of the axes in native order"),
    ("ht-balanced", "tree", "balanced tree (hierarchical Tucker) over the digits in native order"),
):
    SEARCH_METHODS.add(SearchMethod(_name, partial(native_order, _family), explanation=_explanation))
