"""``search``: the layout, topology, ranks and formats of fewest bytes for one tensor, and whether ordering helped."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, partial
from math import prod
from numbers import Integral, Real
from time import perf_counter
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from tensornet_compress.coding import CodedFormat
from tensornet_compress.coding.trellis import STATES
from tensornet_compress.decompose import realise
from tensornet_compress.decompose.linalg import require_finite
from tensornet_compress.errors import TensorNetError
from tensornet_compress.metric import KroneckerMetric
from tensornet_compress.options.offered import SEARCH_FAMILIES, SearchFamily
from tensornet_compress.progress import Progress, SilentProgress
from tensornet_compress.searching.control import controlled, shuffles
from tensornet_compress.searching.engine import Search
from tensornet_compress.searching.limits import Deadline, Limit
from tensornet_compress.searching.result import Null, SearchResult
from tensornet_compress.tensor import NetworkSpec
from tensornet_compress.threads import limited_threads

Ordering = Literal["mode", "fibre", "entry"]
ORDERINGS: tuple[Ordering, ...] = ("mode", "fibre")
_KNOWN_ORDERINGS: tuple[Ordering, ...] = (*ORDERINGS, "entry")
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_MOST_AXES = 52


def search(
    tensor: Tensor | np.ndarray,
    *,
    max_error: float | None = None,
    max_bytes: int | None = None,
    metric: KroneckerMetric | None = None,
    orderings: Sequence[Ordering] = ORDERINGS,
    topologies: Sequence[SearchFamily] = SEARCH_FAMILIES,
    formats: Sequence[str] | None = None,
    time_budget: float = 60.0,
    null: bool = True,
    seed: int = 0,
    progress: Progress | None = None,
) -> SearchResult:
    """Find the network of fewest bytes within a relative error, or of least error within a number of bytes.

    Spectra of unfoldings are computed once and predict every candidate; only the best few are decomposed and measured. Dense
    (quantised) forms and all native orders always compete. An ordering is accepted only when it lowers the total, its own
    bytes included, by more than the same search does on the same entries shuffled: by 1 %, or, where shuffles differ, by 4 of
    their standard deviations (``searching.control.needed``). It runs on one thread, so that results do not depend on their
    number.

    >>> import torch
    >>> import tensornet_compress as tnc
    >>> result = tnc.search(torch.eye(64), max_error=1e-6, formats=["fp32"])
    >>> result.best.nbytes, result.error < 1e-6  # six 2 x 2 identities
    (96, True)

    Args:
        tensor: real, any shape and floating dtype, of PyTorch or NumPy. Errors are of numbers decoded in at least single
            precision; ``to_dense`` of a half precision tensor rounds them once more.
        max_error: relative error in the metric, 0 or more. max_bytes: stored bytes. Exactly one of them.
        metric: of a matrix (first axis, all others); Euclidean by default. It measures and fits; predictions are Euclidean.
        orderings: what may be ordered: ``mode`` (the digits), ``fibre`` (entries along an axis, charged as packed) and, only
            when asked for, ``entry`` (EinSort: sorted entries with ties, charged as entropy-coded): ``result.entry_sort`` is
            the best of them, and ``best`` where nothing else is as good.
        topologies: families that compete besides ``dense``.
        formats: number formats of all cores; by default dense and network formats from 2-bit integers to fp32, and then
            entropy-coded integers (``ec``) for the best layouts.
        time_budget: seconds, null control included (about half); the best so far is returned when they are over or on an
            interrupt (Ctrl-C), and then depends on the speed of the machine. Without its control no ordering counts.
        null: whether to run the null control (of shuffles by ``seed``: one, or several where a gain is not much above its
            luck); without it any gain counts.

    Raises:
        TensorNetError: bad input, or no form fits into ``max_bytes``.
    """
    limit = Limit(max_error, max_bytes)
    _check_formats(formats)
    _check_numbers(time_budget, seed)
    _check_names("orderings", orderings, _KNOWN_ORDERINGS)
    _check_names("topologies", topologies, SEARCH_FAMILIES)
    tensor = checked(tensor)
    _check_metric(metric, tensor)
    metric = None if metric is None else metric.to(tensor.device)
    _compile()
    formats, started = (tuple(formats) if formats is not None else None), perf_counter()
    deadline = started + time_budget
    make = partial(Search, limit=limit, metric=metric, orderings=orderings, families=topologies, formats=formats)

    def luck(shuffled: Tensor) -> Null | None:
        other = make(shuffled, deadline=deadline)
        return None if other.interrupted() else other.as_null()

    control: Null | None = None
    with (progress or SilentProgress()).stage("search", 2 if null else 1) as advance, limited_threads():
        engine = make(tensor, deadline=started + time_budget * (0.5 if null else 1.0))
        interrupted = engine.interrupted()
        advance()
        if null and not interrupted:
            gain = engine.measured.gain() if engine.measured.choice().ordered else 1.0
            control = controlled(shuffles(tensor, seed), luck, gain, Deadline(deadline))
            advance()
    return engine.result(control, null, perf_counter() - started)


@cache
def _compile() -> None:
    """Compile the entropy coder, which in a new installation takes seconds, before the time of a search is counted."""
    for states in (0, STATES):
        realise(torch.eye(16), NetworkSpec.dense((16, 16), CodedFormat(step=0.5, states=states))).to_dense()


def _check_names(what: str, given: Sequence[str], known: Sequence[str]) -> None:
    """All of ``given`` are ``known``; raises ``TensorNetError``."""
    if isinstance(given, str) or not isinstance(given, Sequence):
        raise TensorNetError(f"{what} takes a list of names, was given {'the string ' * isinstance(given, str)}{given!r}")
    unknown = [item for item in given if item not in known]
    if unknown:
        raise TensorNetError(f"unknown {what} {unknown}; choose from {tuple(known)}")


def _check_formats(given: Sequence[str] | None) -> None:
    """A list of names, or nothing; raises ``TensorNetError``."""
    if isinstance(given, str):
        raise TensorNetError(f"formats takes a list of names, was given the string {given!r}; write [{given!r}]")
    if given is not None and not list(given):
        raise TensorNetError("formats is empty; give some, or None for all")
    if strange := [name for name in given or () if not isinstance(name, str)]:
        raise TensorNetError(f"formats takes names such as 'int4g64z', was given {strange[0]!r}")
    if given is not None and set(given) == {"ec"}:
        raise TensorNetError(
            "entropy-coded integers ('ec') are made of the best layouts in other formats; give some of these too"
        )


def _check_numbers(time_budget: float, seed: int) -> None:
    """A positive number of seconds and a whole seed; raises ``TensorNetError``."""
    if isinstance(time_budget, bool) or not isinstance(time_budget, Real) or not time_budget > 0:
        raise TensorNetError(f"time_budget must be a positive number of seconds, was given {time_budget!r}")
    if isinstance(seed, bool) or not isinstance(seed, Integral):
        raise TensorNetError(f"seed must be a whole number, was given {seed!r}")


def checked(tensor: Tensor | np.ndarray) -> Tensor:
    """A finite tensor with axes, as one of PyTorch; raises ``TensorNetError``."""
    if isinstance(tensor, np.ndarray) and tensor.dtype.kind in "fiu" and tensor.dtype.itemsize <= 8:
        tensor = torch.from_numpy(np.array(tensor, tensor.dtype.newbyteorder("="), order="C"))
    if not isinstance(tensor, Tensor):
        kind = f"an array of {tensor.dtype}" if isinstance(tensor, np.ndarray) else type(tensor).__name__
        raise TensorNetError(f"search takes a tensor of PyTorch or an array of real numbers of NumPy, was given {kind}")
    if tensor.layout != torch.strided or tensor.device.type == "meta":
        raise TensorNetError(f"search takes a dense tensor with data, was given a {tensor.layout} one on {tensor.device}")
    if tensor.is_floating_point() and tensor.dtype not in _FLOATS:
        raise TensorNetError(f"search takes 16, 32 or 64 bit floating point, was given {tensor.dtype}; convert with .float()")
    if tensor.ndim > _MOST_AXES:
        raise TensorNetError(f"search takes at most {_MOST_AXES} axes, was given {tensor.ndim}; join or squeeze some")
    require_finite(tensor, "tensor")
    if tensor.ndim == 0:
        raise TensorNetError("a tensor without axes is a single number; there is nothing to search")
    return tensor


def _check_metric(metric: Any, tensor: Tensor) -> None:
    """None, or a metric of matrices (first axis of ``tensor``, all others); raises ``TensorNetError``."""
    if metric is None:
        return
    if not isinstance(metric, KroneckerMetric):
        raise TensorNetError(f"a search takes a KroneckerMetric, was given {metric!r}")
    sides = {"rows": (metric.rows, tensor.shape[0]), "columns": (metric.columns, prod(tensor.shape[1:]))}
    for name, (factor, size) in sides.items():
        if factor is not None and len(factor) != size:
            raise TensorNetError(
                f"the metric's {name} are of {len(factor)}, but a tensor of shape {tuple(tensor.shape)} has {size} {name} "
                "(first axis by all others)"
            )
