"""What each stage of compression in a metric costs on SmolLM2-135M: seconds of the processor and peak memory.

    python benchmarks/geometry_cost.py [--windows 4] [--resume]

Every stage runs in a process of its own on one thread, on the same windows of 512 tokens, in float32. ``seconds`` are the
processor's, of the stage alone; ``peak_bytes`` is the most memory that the process held during it less what it held before.
``passes`` is the time over that of one forward pass over the same tokens (for the stages with gradients: of one forward and
backward pass), which is what the stage cannot do without.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import threading
from collections.abc import Callable
from time import process_time
from typing import Any

import psutil
import torch
from common import LENGTH, MODEL, RESULTS, write_result
from torch import Tensor

import tensornet_compress as tnc
from tensornet_compress.calibrate import collect_statistics, kept_output, model_inputs, sampled_loss, statistics_by_block
from tensornet_compress.coding import parse_format
from tensornet_compress.compressing import compress
from tensornet_compress.decompose import realise
from tensornet_compress.inputs import calibration_windows, load_causal_lm, load_tokenizer
from tensornet_compress.nn import find_targets, layer_weight, replace_module
from tensornet_compress.nn.plan import Plan, layer_plan
from tensornet_compress.train import BlockRefinement, Propagation, Schedule, heal, isvt, propagate
from tensornet_compress.train.reduction import rank_spec

BITS = 9.6
FORWARD, BACKWARD = "forward pass", "forward and backward pass"


class Bench:
    """A model with windows; every method prepares a stage and gives back what is timed."""

    def __init__(self, windows: int):
        self.model = load_causal_lm(MODEL, torch.float32)
        self.windows = calibration_windows(load_tokenizer(MODEL), LENGTH, windows + 1)
        self.batches = list(self.windows[:windows].split(1))
        self.names = [target.name for target in find_targets(self.model)[0]]
        self.budget = tnc.Budget(bits_per_weight=BITS)

    def forward(self) -> Callable[[], Any]:
        def run() -> None:
            with torch.no_grad():
                for batch in self.batches:
                    self.model(input_ids=batch)

        return run

    def backward(self) -> Callable[[], Any]:
        self.model.requires_grad_(False)
        embedding = self.model.get_input_embeddings()
        embedding.register_forward_hook(lambda _module, _given, output: output.requires_grad_())

        def run() -> None:
            for batch in self.batches:
                output, logits = kept_output(self.model, model_inputs(batch, torch.device("cpu")))
                sampled_loss(output, logits, torch.Generator().manual_seed(0)).backward()

        return run

    def statistics(self, kind: str) -> Callable[[], Any]:
        return lambda: collect_statistics(self.model, self.batches, self.names, [kind])

    def by_block(self, kind: str) -> Callable[[], Any]:
        def run() -> None:
            for _ in statistics_by_block(self.model, self.batches, self.names, [kind]):
                pass

        return run

    def allocation(self) -> Callable[[], Any]:
        options: dict[str, Any] = {"method": "svd", "formats": ["bf16"], "refine": 0, "workers": 1}
        return lambda: compress(self.model, self.budget, self.batches, **options)

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
        plan = self.plan()
        settings = Propagation(refinement=refinement)
        return lambda: propagate(self.model, plan, self.batches, settings)

    def thresholding(self) -> Callable[[], Any]:
        return lambda: isvt(self.model, self.batches, self.budget, metric="input", schedule=Schedule(steps=1), step=0.5)

    def healing(self) -> Callable[[], Any]:
        other = load_causal_lm(MODEL, torch.float32)
        for name, layer in self.plan().layers.items():
            replace_module(other, name, realise(layer_weight(other.get_submodule(name)).contiguous(), layer.spec))
        held: list[Tensor] = [self.windows[-1:]]
        return lambda: heal(other, self.batches, teacher=self.model, steps=len(self.batches), validation=held, every=1000)


STAGES: dict[str, tuple[Callable[[Bench], Callable[[], Any]], str]] = {
    # label: what prepares the stage, and the pass over the same tokens that it is measured against
    FORWARD: (Bench.forward, FORWARD),
    BACKWARD: (Bench.backward, BACKWARD),
    "statistics: diagonal": (lambda bench: bench.statistics("diagonal"), FORWARD),
    "statistics: input": (lambda bench: bench.statistics("input"), FORWARD),
    "statistics: row-fisher": (lambda bench: bench.statistics("row-fisher"), BACKWARD),
    "statistics: kronecker": (lambda bench: bench.statistics("kronecker"), BACKWARD),
    "statistics: elementwise": (lambda bench: bench.statistics("elementwise"), BACKWARD),
    "statistics: input, block by block": (lambda bench: bench.by_block("input"), FORWARD),
    "healing, one epoch": (Bench.healing, BACKWARD),
    "propagation": (Bench.propagation, FORWARD),
    "propagation, one epoch of refinement": (lambda bench: bench.propagation(BlockRefinement(epochs=1)), BACKWARD),
    "ISVT, one step": (Bench.thresholding, BACKWARD),
    "statistics, survey, allocation, truncation": (Bench.allocation, BACKWARD),
    "statistics: kronecker, block by block": (lambda bench: bench.by_block("kronecker"), BACKWARD),
}


class Watch:
    """The most memory that this process holds while the watch runs, by looking every few milliseconds."""

    def __enter__(self) -> Watch:
        self.process, self.done = psutil.Process(), threading.Event()
        self.before = self.peak = self.process.memory_info().rss
        self.thread = threading.Thread(target=self._look, daemon=True)
        self.thread.start()
        return self

    def _look(self) -> None:
        while not self.done.wait(0.01):
            self.peak = max(self.peak, self.process.memory_info().rss)

    def __exit__(self, *_: object) -> None:
        self.done.set()
        self.thread.join()


def child(stage: str, windows: int) -> None:
    torch.set_num_threads(1)
    run = STAGES[stage][0](Bench(windows))
    gc.collect()
    with Watch() as watch:
        started = process_time()
        run()
        seconds = process_time() - started
    print(json.dumps({"stage": stage, "seconds": seconds, "peak_bytes": watch.peak - watch.before, "held_bytes": watch.before}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--resume", action="store_true", help="keep the rows of the result file")
    parser.add_argument("--child", choices=STAGES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments.child, arguments.windows)
        return
    settings = {"model": MODEL, "length": LENGTH, "windows": arguments.windows, "bits_per_weight": BITS, "torch_threads": 1}
    stored = RESULTS / "geometry_cost.json"
    rows: list[dict[str, Any]] = json.loads(stored.read_text())["rows"] if arguments.resume else []
    for stage, (_, needed) in STAGES.items():
        if any(row["stage"] == stage for row in rows):
            continue
        command = [sys.executable, __file__, "--windows", str(arguments.windows), "--child", stage]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        row = json.loads(done.stdout.splitlines()[-1]) | {"against": needed}
        rows.append(row)
        row["passes"] = row["seconds"] / next(r["seconds"] for r in rows if r["stage"] == needed)
        print(row, flush=True)
        write_result("geometry_cost", {"settings": settings, "rows": rows})


if __name__ == "__main__":
    main()
