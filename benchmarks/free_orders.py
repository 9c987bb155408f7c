"""Orders absorbed for free: are outputs equal, and what do the orders buy?

Inner axes of SmolLM2 are ordered by size of their weights, absorbed by neighbouring weights; then all block linears are rounded
to nearest (no calibration) in groups of 64. Judged as by ``tensornet-compress bench weights``.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache, partial
from typing import Any

import torch
from experiments import LANGUAGE, experiment

import tensornet_compress as tnc
from tensornet_compress.bench.harness import ERROR, Job
from tensornet_compress.bench.metrics import metrics_of
from tensornet_compress.bench.weights import WeightBench, WeightSettings
from tensornet_compress.experimental import FreeOrders, free_orders, reordered
from tensornet_compress.report import Measure

SETTINGS = WeightSettings.full(model=LANGUAGE, heldout_windows=8)
FORMATS = {"int4g64o": 4.5, "int3g64o": 3.5}
KINDS = {"native": (), "neurons": ("neurons",), "residual": ("residual",), "values": ("values",)}
KINDS["all"] = ("neurons", "residual", "values")
MEASURES = {
    "logit_change": Measure(title="largest change of a logit", better="lower", explanation="By the orders, before rounding."),
    "squared_error": Measure(title="squared error", better="lower", explanation="Of all block linears."),
    "error": ERROR,
} | {metric.name: metric.measure for metric in metrics_of("weights")}


@cache
def bench() -> WeightBench:
    made = WeightBench(SETTINGS)
    made.prepare()
    return made


@torch.no_grad()
def row(fmt: str, kind: str) -> dict[str, Any]:
    model: Any = bench().case.model
    window = bench().reference[0][:1]
    exact, chosen = model(window).logits, free_orders(model)
    with reordered(model, FreeOrders(**{name: getattr(chosen, name) for name in KINDS[kind]})):
        change = float((model(window).logits - exact).abs().max())
        matrices = {target.name: bench().case.matrix(target) for target in bench().case.targets}
        budget = tnc.Budget(bits_per_weight=FORMATS[fmt] + 0.1)
        try:
            tnc.compress(model, budget, method="dense", formats=[fmt], allocator="uniform", workers=1)
            lost = 0.0
            for name, matrix in matrices.items():
                module: Any = model.get_submodule(name)
                lost += float((module.dense_weight(torch.float32) - matrix).double().square().sum())
            quality = bench().quality().values
        finally:
            bench().case.put_back()
    return {
        "values": {"logit_change": change, "squared_error": lost} | quality,
        "settings": {"largest_logit": float(exact.abs().max())},
    }


def jobs() -> Iterator[Job]:
    for fmt in FORMATS:
        for kind in KINDS:
            yield Job("weights", fmt, f"orders: {kind}", partial(row, fmt, kind), ours=True)


if __name__ == "__main__":
    experiment(jobs(), MEASURES, {"model": LANGUAGE, "windows": SETTINGS.heldout_windows, "length": SETTINGS.length})
