"""Seconds to compress: every weight method from a model with nothing known about it, calibration included."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from tensornet_compress.bench.race import clock
from tensornet_compress.bench.side import Unavailable
from tensornet_compress.bench.speed import OURS, TRACKS, Heat, SpeedSettings, Timed, Track
from tensornet_compress.bench.weight_case import WEIGHT_METHODS
from tensornet_compress.bench.weights import WeightBench, WeightSettings

QUICK_METHODS = (OURS, "svd", "svd-llm", "rtn", "gptq", "hqq")
WINDOWS, LENGTH = 2, 128


def heats(settings: SpeedSettings) -> Iterator[Heat]:
    """One: the layers of a middle block, or one of them in a quick run."""
    names = QUICK_METHODS if settings.quick else tuple(method.name for method in WEIGHT_METHODS)
    what = "the first layer of the middle block" if settings.quick else "the middle block"
    yield Heat(f"compressing {what} to {settings.bits:g} bits", names, lambda: _compress(settings, names))


def _compress(settings: SpeedSettings, names: tuple[str, ...]) -> Timed:
    weights = WeightSettings(
        model=settings.model,
        text=settings.text,
        bits=(settings.bits,),
        calibration_windows=WINDOWS,
        length=LENGTH,
        quick=settings.quick,
        seed=settings.seed,
    )
    case = WeightBench(weights).case
    if settings.quick:
        case.targets = case.targets[:1]
        case.patterns = [case.targets[0].name]
    read, seconds, missing = clock(), {}, {}
    for name in names:
        case.memo.clear()
        torch.manual_seed(settings.seed)
        began = read()
        try:
            WEIGHT_METHODS[name].compress(case, settings.bits)
            seconds[name] = read() - began
        except Unavailable as reason:
            missing[name] = str(reason)
        finally:
            case.put_back()
    layers = [target.name for target in case.targets]
    return Timed(seconds, missing, settings={"layers": layers, "calibration": [WINDOWS, LENGTH]})


TRACKS.add(Track("compressing", heats))
