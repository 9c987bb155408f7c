"""What each stage of compression in a metric costs on SmolLM2-135M: seconds of the processor and peak memory.

Every stage runs in a process of its own on one thread, on the same windows of 512 tokens, in float32. ``passes`` is its time
over that of one forward pass over the same tokens (for stages with gradients: of one forward and backward pass), which is what
it cannot do without.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import torch
from experiments import LANGUAGE, TIME, experiment

import tensornet_compress as tnc
from tensornet_compress.bench.harness import Job
from tensornet_compress.bench.processes import cost_apart
from tensornet_compress.bench.speed import MEASURES as SPEED
from tensornet_compress.calibrate import collect_statistics, kept_output, model_inputs, sampled_loss, statistics_by_block
from tensornet_compress.coding import parse_format
from tensornet_compress.decompose import realise
from tensornet_compress.inputs import calibration_windows, load_causal_lm, load_tokenizer
from tensornet_compress.nn import find_targets, layer_weight, replace_module
from tensornet_compress.nn.plan import Plan, layer_plan
from tensornet_compress.report import Measure
from tensornet_compress.train import BlockRefinement, Propagation, Schedule, heal, isvt, propagate
from tensornet_compress.train.reduction import rank_spec

BITS, WINDOWS, LENGTH = 9.6, 4, 512
MEASURES = {
    "time": TIME,
    "passes": Measure(title="time over that of a pass", better="lower"),
    "peak_nbytes": SPEED["peak_nbytes"],
}


class Stages:
    """A model with windows; every method prepares a stage and gives back what is timed."""

    def __init__(self) -> None:
        self.model = load_causal_lm(LANGUAGE, torch.float32)
        self.windows = calibration_windows(load_tokenizer(LANGUAGE), LENGTH, WINDOWS + 1)
        self.batches = list(self.windows[:WINDOWS].split(1))
        self.names = [target.name for target in find_targets(self.model)[0]]
        self.budget = tnc.Budget(bits_per_weight=BITS)

    @torch.no_grad()
    def forward(self) -> None:
        for batch in self.batches:
            self.model(input_ids=batch)

    def backward(self) -> Callable[[], Any]:
        self.model.requires_grad_(False)
        self.model.get_input_embeddings().register_forward_hook(lambda _module, _given, output: output.requires_grad_())

        def run() -> None:
            for batch in self.batches:
                output, logits = kept_output(self.model, model_inputs(batch, torch.device("cpu")))
                sampled_loss(output, logits, torch.Generator().manual_seed(0)).backward()

        return run

    def statistics(self, kind: Any) -> Callable[[], Any]:
        return partial(collect_statistics, self.model, self.batches, self.names, [kind])

    def by_block(self, kind: Any) -> Callable[[], Any]:
        return lambda: [None for _ in statistics_by_block(self.model, self.batches, self.names, [kind])]

    def allocation(self) -> Callable[[], Any]:
        options: dict[str, Any] = {"method": "svd", "formats": ["bf16"], "workers": 1}
        return partial(tnc.compress, self.model, self.budget, self.batches, **options)

    @property
    def plan(self) -> Plan:
        """Uniform ranks."""
        layers = {}
        for target in find_targets(self.model)[0]:
            module = self.model.get_submodule(target.name)
            weight = layer_weight(module)
            rank = int(BITS / 16 * weight.numel() / sum(weight.shape))
            layers[target.name] = layer_plan(target, module, rank_spec(weight, rank, parse_format("bf16")))
        return Plan(layers=layers)

    def propagation(self, refinement: BlockRefinement | None = None) -> Callable[[], Any]:
        return partial(propagate, self.model, self.plan, self.batches, Propagation(refinement=refinement))

    def thresholding(self) -> Callable[[], Any]:
        return partial(isvt, self.model, self.batches, self.budget, metric="input", schedule=Schedule(steps=1), step=0.5)

    def healing(self) -> Callable[[], Any]:
        other, held = load_causal_lm(LANGUAGE, torch.float32), [self.windows[-1:]]
        for name, layer in self.plan.layers.items():
            replace_module(other, name, realise(layer_weight(other.get_submodule(name)).contiguous(), layer.spec))
        return partial(heal, other, self.batches, teacher=self.model, steps=WINDOWS, validation=held, every=1000)


FORWARD, BACKWARD = "forward pass", "forward and backward pass"
STAGES: dict[str, tuple[Callable[[Stages], Callable[[], Any]], str]] = {
    # label: what prepares the stage, and the pass over the same tokens that it is measured against
    FORWARD: (lambda stages: stages.forward, FORWARD),
    BACKWARD: (Stages.backward, BACKWARD),
    **{f"statistics: {kind}": (partial(Stages.statistics, kind=kind), FORWARD) for kind in ("diagonal", "input")},
    **{
        f"statistics: {kind}": (partial(Stages.statistics, kind=kind), BACKWARD)
        for kind in ("row-fisher", "kronecker", "elementwise")
    },
    "statistics: input, block by block": (partial(Stages.by_block, kind="input"), FORWARD),
    "statistics: kronecker, block by block": (partial(Stages.by_block, kind="kronecker"), BACKWARD),
    "statistics, survey, allocation, truncation": (Stages.allocation, BACKWARD),
    "propagation": (Stages.propagation, FORWARD),
    "propagation, one epoch of refinement": (partial(Stages.propagation, refinement=BlockRefinement(epochs=1)), BACKWARD),
    "healing, one epoch": (Stages.healing, BACKWARD),
    "ISVT, one step": (Stages.thresholding, BACKWARD),
}


def prepared(stage: str) -> Callable[[], bool]:
    work = STAGES[stage][0](Stages())
    return lambda: work() is None  # what was made stays in its process


@cache
def cost(stage: str) -> tuple[float, int]:
    _, spent = cost_apart(prepared, stage)
    return spent.processor_seconds, spent.peak_nbytes


def row(stage: str) -> dict[str, Any]:
    (seconds, peak), needed = cost(stage), STAGES[stage][1]
    values = {"time": seconds, "passes": seconds / cost(needed)[0], "peak_nbytes": peak}
    return {"values": values, "settings": {"against": needed}}


def jobs() -> Iterator[Job]:
    for stage in STAGES:
        yield Job("speed", LANGUAGE, stage, partial(row, stage), ours=True)


if __name__ == "__main__":
    experiment(jobs(), MEASURES, {"tokens": WINDOWS * LENGTH, "bits_per_weight": BITS})
