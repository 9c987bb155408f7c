"""Seconds to find a network of one tensor: our search beside other tools, on the same tensor at the same error."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from tensornet_compress.bench.race import clock
from tensornet_compress.bench.search_case import SEARCH_METHODS, SearchCase
from tensornet_compress.bench.side import Unavailable
from tensornet_compress.bench.speed import TRACKS, Heat, SpeedSettings, Timed, Track
from tensornet_compress.bench.tensors import TENSORS, BenchTensor

SUBJECTS = ("wave", "heat")
ERROR = 0.1


def heats(settings: SpeedSettings) -> Iterator[Heat]:
    """Each field."""
    names = tuple(method.name for method in SEARCH_METHODS)

    def heat(tensor: BenchTensor) -> Heat:
        return Heat(f"searching {tensor.title}", names, lambda: _search(settings, tensor, names))

    for name in SUBJECTS[:1] if settings.quick else SUBJECTS:
        yield heat(TENSORS[name])


def _search(settings: SpeedSettings, tensor: BenchTensor, names: tuple[str, ...]) -> Timed:
    data = tensor.load()
    case = SearchCase(data, ERROR * tensor.tolerance, settings.budget, settings.seed)
    read, seconds, missing = clock(), {}, {}
    for name in names:
        torch.manual_seed(settings.seed)
        began = read()
        try:
            SEARCH_METHODS[name].run(case)
            seconds[name] = read() - began
        except Unavailable as reason:
            missing[name] = str(reason)
    return Timed(seconds, missing, settings={"shape": list(data.shape), "max_error": case.max_error})


TRACKS.add(Track("searching", heats))
