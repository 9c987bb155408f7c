"""The usual formats in native order: SVD of axes, TT and a balanced tree (HT) with our rank rule, and teneva's TT-SVD; all of
them with our number formats."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tensornet_compress.bench.peer_packages import SIDE, Unavailable
from tensornet_compress.bench.registry import Method
from tensornet_compress.bench.search_case import SEARCH_METHODS, SearchCase, Stored
from tensornet_compress.coding import format_nbytes, parse_format
from tensornet_compress.decompose import feasible_ranks, ranks_for_error
from tensornet_compress.options.offered import SEARCH_CORE_FORMATS, fine_digits
from tensornet_compress.options.rounding import rounding_error
from tensornet_compress.searching import SpectrumStore, search
from tensornet_compress.searching.shapes import native_shapes
from tensornet_compress.tensor import TermSpec

_SLACK = (1.0, 0.9, 0.75)
_HOPELESS = 1.3


def native_order(family: Any, case: SearchCase, error: float) -> Stored:
    """The smallest measured network of a family; where all are far beyond the dense size, what spectra predict."""
    result = search(case.tensor, max_error=error, topologies=(family,), orderings=(), null=False, time_budget=120)
    measured = [(f.nbytes, f.error) for f in result.found if f.family != "dense" and f.error <= error]
    if measured:
        return Stored(*min(measured))
    predicted = [event.nbytes for event in result.history if event.what.endswith("predicted")]
    nbytes = min(predicted) if predicted else _unmerged(case.tensor, family, error)
    if nbytes is None:
        raise Unavailable(f"no {family} network of this tensor keeps the error")
    return Stored(nbytes, None, "predicted from spectra, not made: more than 1.3 times the dense size")


def _unmerged(tensor: Tensor, family: Any, error: float) -> int | None:
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


def teneva(case: SearchCase, error: float) -> Stored:
    """teneva's smallest train over the digits of the axes, over all formats, that was measured to keep the error. Raises
    ``Unavailable``: none keeps it in fewer bytes than 1.3 times fp32."""
    package: Any = SIDE.module("teneva")
    modes = fine_digits(tuple(case.tensor.shape)).apply(case.tensor)
    norm, bonds = float(modes.double().norm()), max(1, modes.ndim - 1)
    best: Stored | None = None
    for name in SEARCH_CORE_FORMATS:
        fmt = parse_format(name)
        for slack in _SLACK:
            allowed = (slack * error) ** 2 - rounding_error(fmt) * modes.ndim
            if allowed <= 0:
                continue
            cores = package.svd(modes.double().numpy(), e=float(np.sqrt(allowed / bonds)) * norm)
            nbytes = sum(format_nbytes(fmt, tuple(core.shape)) for core in cores)
            if nbytes > _HOPELESS * 4 * case.tensor.numel() or (best is not None and nbytes >= best.nbytes):
                break
            plain = [torch.from_numpy(np.ascontiguousarray(core)).float() for core in cores]
            decoded = [fmt.decode(fmt.encode(core), tuple(core.shape), torch.float32).double().numpy() for core in plain]
            measured = float((torch.from_numpy(package.full(decoded)).float() - modes).norm() / norm)
            if measured <= error:
                ranks = [int(core.shape[-1]) for core in cores[:-1]]
                best = Stored(nbytes, measured, settings={"format": name, "ranks": ranks, "modes": list(modes.shape)})
                break
    if best is None:
        raise Unavailable(f"no train keeps the error in fewer bytes than {_HOPELESS} times fp32")
    return best


for _name, _run, _explanation in (
    ("svd", partial(native_order, "svd"), "two cores that cut the axes"),
    ("tt-native", partial(native_order, "tt"), "tensor train over the digits of the axes in native order"),
    ("ht-balanced", partial(native_order, "tree"), "balanced tree (hierarchical Tucker) over the digits in native order"),
    ("teneva", teneva, "teneva's TT-SVD over the digits, cores in our formats"),
):
    SEARCH_METHODS.add(Method(_name, _run, _explanation))
