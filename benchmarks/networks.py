"""Trains and trees fitted in the metric (ALS) against the same networks fitted in the Euclidean norm, and against two cores.

The layers of a middle block of SmolLM2-135M and of MiniLM, bf16 cores, native digits, equal bytes (each network takes what it
can use of the same budget). ``output_error``: relative squared error of the layer's outputs on the inputs of held-out text.
``divergence``: what the model answers with that one layer replaced, as ``tensornet-compress bench weights`` judges.
Geometric means over the layers.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache, partial
from statistics import geometric_mean
from typing import Any

import torch
from experiments import ENCODER, KL, LANGUAGE, experiment
from torch import Tensor

from tensornet_compress.bench.harness import ERROR, STORED, Job
from tensornet_compress.bench.weights import WeightBench, WeightSettings
from tensornet_compress.calibrate import collect_statistics
from tensornet_compress.coding import parse_format
from tensornet_compress.decompose import bond_spectra, feasible_ranks, ranks_for_bytes, realise
from tensornet_compress.metric import KroneckerMetric
from tensornet_compress.nn import Target, replace_module
from tensornet_compress.options import native_layout
from tensornet_compress.report import Measure
from tensornet_compress.tensor import Layout, NetworkSpec, TermSpec, Topology

SHARE, SWEEPS, BF16 = 0.4, 4, parse_format("bf16")
BLOCKS = {ENCODER: "encoder.layer.3.*", LANGUAGE: "model.layers.15.*"}
FAMILIES, METRICS = ("two cores", "tt", "ttm", "tree"), ("euclidean", "input")
MEASURES = {
    "output_error": Measure(title="squared error of outputs", better="lower"),
    "divergence": Measure(title="divergence of the model", better="lower", explanation=f"{KL.title}, or one minus the cosine."),
    "error": ERROR,
    "nbytes": STORED,
}


@lru_cache(maxsize=1)
def bench(model: str) -> tuple[WeightBench, dict[str, Tensor]]:
    """A middle block, and second moments of its layers' inputs on held-out text."""
    made = WeightBench(WeightSettings.full(model=model, targets=(BLOCKS[model],)))
    made.prepare()
    held = made.reference[0]
    windows = isinstance(held, Tensor)
    batches = list(held.split(4)) if windows else [made.encoded(held[i : i + 16]) for i in range(0, len(held), 16)]
    names = [target.name for target in made.case.targets]
    statistics = collect_statistics(made.case.model, batches, names, ["input"])
    return made, {name: of_layer.input.mean for name, of_layer in statistics.items()}


def network_spec(weight: Tensor, family: str) -> NetworkSpec:
    """The richest network of a family within ``SHARE`` of the bf16 bytes, by the spectra of its unfoldings."""
    shape = tuple(weight.shape)
    allowed = int(SHARE * 2 * weight.numel())
    layout, topology = Layout.native(shape), Topology.two_cores(2, (0,))
    ranks = [allowed // (2 * sum(shape))]
    if family != "two cores":
        placed = native_layout(shape, family)  # type: ignore[arg-type]
        assert placed is not None
        layout, topology = placed
        spectra = bond_spectra(layout.apply(weight), topology)
        ranks = list(feasible_ranks(ranks_for_bytes(spectra, allowed, layout, topology, BF16), layout, topology))
    term = TermSpec(layout=layout, topology=topology, ranks=tuple(ranks), formats=(BF16,) * len(topology.legs))
    return NetworkSpec.model_validate({"shape": shape, "dtype": "float32", "terms": (term,)})


def replaced(model: str, target: Target, family: str, metric: str) -> dict[str, float]:
    """One layer as a network: its errors, and what the model loses."""
    judge, moments = bench(model)
    weight = judge.case.matrix(target)
    chosen = None if metric == "euclidean" else judge.case.metrics("input")[target.name]
    network = realise(weight, network_spec(weight, family), chosen, sweeps=SWEEPS)
    change, held = weight - network.to_dense(torch.float32), KroneckerMetric(columns=moments[target.name])
    replace_module(judge.case.model, target.name, network)
    try:
        quality = judge.quality().values
    finally:
        judge.case.put_back()
    return {
        "output_error": held.norm2(change) / held.norm2(weight),
        "divergence": quality["kl"] if model == LANGUAGE else 1 - quality["mean_cosine"],
        "error": float(change.norm() / weight.norm()),
        "nbytes": network.nbytes,
    }


def row(model: str, family: str, metric: str) -> dict[str, Any]:
    layers = {target.name: replaced(model, target, family, metric) for target in bench(model)[0].case.targets}
    values = {name: geometric_mean([layer[name] for layer in layers.values()]) for name in MEASURES}
    return {"values": values, "settings": {"layers": layers}}


def jobs() -> Iterator[Job]:
    for model in BLOCKS:
        for family in FAMILIES:
            for metric in METRICS:
                work = partial(row, model, family, metric)
                yield Job("weights", model, f"{family}, {metric}", work, SHARE, "of the bytes", ours=True)


if __name__ == "__main__":
    experiment(jobs(), MEASURES, {"share": SHARE, "sweeps": SWEEPS, "format": "bf16"})
