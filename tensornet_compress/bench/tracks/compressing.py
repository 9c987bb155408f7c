"""Seconds to compress a model with every weight method, and to find a network of one tensor with every search method."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from tensornet_compress.bench.peer_packages import reason
from tensornet_compress.bench.processes import cost_apart
from tensornet_compress.bench.search_case import SEARCH_METHODS, SearchCase
from tensornet_compress.bench.speed_case import OURS, TRACKS, Heat, Raced, SpeedSettings, Track, clock
from tensornet_compress.bench.tensors import TENSORS, BenchTensor
from tensornet_compress.bench.weight_case import WEIGHT_METHODS, WeightCase
from tensornet_compress.bench.weights import WeightBench, WeightSettings
from tensornet_compress.calibrate.batches import model_inputs, model_output
from tensornet_compress.compressing import Budget, compress

QUICK_METHODS = (OURS, "svd", "svd-llm", "rtn", "gptq", "hqq")
WINDOWS, LENGTH = 2, 128
WHOLE, WHOLE_BITS, WHOLE_WINDOWS, WHOLE_LENGTH = (OURS, "ours-coded", "gptq", "rtn"), 3.5, 8, 256
"""A whole model needs more tokens than its layers have inputs: with fewer, two cores win that no one would choose."""
FORWARD, BARE, BY_BLOCK = "forward", "bare-svd", "ours-by-block"
"""One forward pass over the calibration tokens, an SVD of each weight, and ours with the statistics of a block at a time."""
SUBJECTS = ("wave", "heat")


def once(
    seed: int, contenders: Iterable[tuple[str, Callable[[], object]]], after: Callable[[], object] = lambda: None
) -> Raced:
    """Every contender timed on one call; ``after`` follows each."""
    read = clock()
    seconds: dict[str, dict[str, float]] = {}
    missing: dict[str, str] = {}
    for name, call in contenders:
        torch.manual_seed(seed)
        began = read()
        try:
            call()
            seconds[name] = {"time": read() - began}
        except Exception as error:  # as in the harness
            missing[name] = reason(error)
        finally:
            after()
    return Raced(seconds, missing)


def compressing(settings: SpeedSettings) -> Iterator[Heat]:
    """From a model with nothing known about it, calibration included: the layers of a middle block by every method (one layer
    in a quick run), then, in a full run, all blocks on all threads, with peak memory, beside what one could not do without."""
    names = QUICK_METHODS if settings.quick else tuple(method.name for method in WEIGHT_METHODS)
    what = "the first layer of the middle block" if settings.quick else "the middle block"
    yield Heat(f"compressing {what} to {settings.bits:g} bits", names, lambda: _compress(settings, names))
    if not settings.quick:
        subject = f"compressing all blocks to {WHOLE_BITS:g} bits"
        yield Heat(subject, (*WHOLE, BY_BLOCK, FORWARD, BARE), lambda: _whole(settings))


def _weights(settings: SpeedSettings, bits: float, windows: int, length: int) -> WeightSettings:
    return WeightSettings(
        model=settings.model,
        text=settings.text,
        bits=(bits,),
        calibration_windows=windows,
        length=length,
        quick=settings.quick,
        seed=settings.seed,
    )


def _compress(settings: SpeedSettings, names: tuple[str, ...]) -> Raced:
    case = WeightBench(_weights(settings, settings.bits, WINDOWS, LENGTH)).case
    if settings.quick:
        case.targets = case.targets[:1]
        case.patterns = [case.targets[0].name]

    def call(name: str) -> object:
        case.memo.clear()
        return WEIGHT_METHODS[name].run(case, settings.bits)

    raced = once(settings.seed, [(name, partial(call, name)) for name in names], case.put_back)
    layers = [target.name for target in case.targets]
    return replace(raced, settings={"layers": layers, "calibration": [WINDOWS, LENGTH]})


def _whole(settings: SpeedSettings) -> Raced:
    values, missing, threads = {}, {}, torch.get_num_threads()
    weights = _weights(settings, WHOLE_BITS, WHOLE_WINDOWS, WHOLE_LENGTH)
    for name in (*WHOLE, BY_BLOCK, FORWARD, BARE):
        try:
            _, cost = cost_apart(_prepared, weights, name, threads=threads)
        except Exception as error:  # as in the harness
            missing[name] = reason(error)
            continue
        seconds = cost.processor_seconds if threads == 1 else cost.seconds
        values[name] = {"time": seconds, "peak_nbytes": float(cost.peak_nbytes)}
    return Raced(values, missing, {"calibration": [WHOLE_WINDOWS, WHOLE_LENGTH], "workers": threads})


def _prepared(settings: WeightSettings, name: str) -> Callable[[], object]:
    """The work of a contender on all layers."""
    case = WeightBench(replace(settings, blocks=None)).case
    case.workers = torch.get_num_threads()
    if name == BARE:
        matrices = [case.matrix(target) for target in case.targets]
        return lambda: [torch.linalg.svd(matrix, full_matrices=False).S.numel() for matrix in matrices]
    if name == FORWARD:
        return lambda: _passed(case)
    if name == BY_BLOCK:
        names, budget = [target.name for target in case.targets], Budget(bits_per_weight=settings.bits[0])
        windows = [window for batch in case.batches for window in batch.split(1)]
        return lambda: len(compress(case.model, budget, windows, targets=names, by_block=True, workers=case.workers).layers)
    return lambda: len(WEIGHT_METHODS[name].run(case, settings.bits[0]).layers)


@torch.no_grad()
def _passed(case: WeightCase) -> int:
    return len([model_output(case.model, model_inputs(batch, torch.device("cpu"))) for batch in case.batches])


def searching(settings: SpeedSettings) -> Iterator[Heat]:
    """Our search beside other tools, on the same field at the same error."""
    names = tuple(method.name for method in SEARCH_METHODS)
    for subject in SUBJECTS[:1] if settings.quick else SUBJECTS:
        tensor = TENSORS[subject]
        yield Heat(f"searching {tensor.title}", names, partial(_search, settings, tensor))


def _search(settings: SpeedSettings, tensor: BenchTensor) -> Raced:
    case, error = SearchCase(tensor.load(), settings.budget, settings.seed), tensor.errors[0]
    calls: list[tuple[str, Any]] = [(method.name, partial(method.run, case, error)) for method in SEARCH_METHODS]
    return replace(once(settings.seed, calls), settings={"shape": list(case.tensor.shape), "max_error": error})


TRACKS.add(Track("compressing", compressing))
TRACKS.add(Track("searching", searching))
