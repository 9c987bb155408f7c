"""Forward time of the emitted two-core module against two hand-written matmuls and against the dense layer.

    python benchmarks/module_speed.py

``by_hand`` is a module of two matrices, as one would write it to stand in a model; ``matmuls`` is the bare expression
``x @ right.T @ left.T`` outside any module. Ratios of medians, all contenders measured in turn so that drift cancels.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from time import perf_counter
from typing import Any

import torch
import torch.nn.functional as F
from common import MODEL, write_result
from torch import Tensor

import tensornet_compress as tnc

SHAPES = {
    "q_proj, o_proj": (576, 576),
    "k_proj, v_proj": (192, 576),
    "gate_proj, up_proj": (1536, 576),
    "down_proj": (576, 1536),
}
BATCHES = (1, 512)
KEEP = 0.6
ROUNDS = 41


class ByHand(torch.nn.Module):
    """The module that one would write by hand: two matrices, two matmuls."""

    def __init__(self, left: Tensor, right: Tensor):
        super().__init__()
        self.left, self.right = torch.nn.Parameter(left.clone()), torch.nn.Parameter(right.clone())

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.right), self.left)


def main() -> None:
    torch.manual_seed(0)
    rows = []
    for name, (out_features, in_features) in SHAPES.items():
        rank = int(KEEP * out_features * in_features / (out_features + in_features))
        dense = torch.nn.Linear(in_features, out_features, bias=False)
        network = tnc.to_network(dense.weight.detach(), tnc.Topology.two_cores(2, (0,)), ranks=rank)
        ours = tnc.TNLinear.from_linear(dense, network)
        left, right = (core.clone() for core in network.cores())
        by_hand = ByHand(left, right)

        def matmuls(x: Tensor, left: Tensor = left, right: Tensor = right) -> Tensor:
            return x @ right.T @ left.T

        for mode in ("eager", "compiled"):
            contenders: dict[str, Callable[[Tensor], Tensor]] = {
                "by_hand": by_hand,
                "matmuls": matmuls,
                "ours": ours,
                "dense": dense,
            }
            if mode == "compiled":
                torch.compiler.reset()
                contenders = {key: torch.compile(value, fullgraph=True) for key, value in contenders.items()}
            for batch in BATCHES:
                times = race(contenders, torch.randn(batch, in_features))
                row: dict[str, Any] = {"layer": name, "shape": [out_features, in_features], "rank": rank, "mode": mode}
                row |= {"batch": batch, "median_seconds": times, "ours_over_by_hand": times["ours"] / times["by_hand"]}
                row |= {"ours_over_bare_matmuls": times["ours"] / times["matmuls"]}
                rows.append(row | {"ours_over_dense": times["ours"] / times["dense"]})
                print(
                    f"{name:20} {mode:9} batch {batch:4}: ours/by hand {rows[-1]['ours_over_by_hand']:.3f}, "
                    f"ours/bare matmuls {rows[-1]['ours_over_bare_matmuls']:.3f}, ours/dense {rows[-1]['ours_over_dense']:.3f}",
                    flush=True,
                )
    worst = max(row["ours_over_by_hand"] for row in rows)
    print(f"largest ratio to two hand-written matmuls: {worst:.3f}")
    write_result("module_speed", {"model": MODEL, "settings": {"keep": KEEP, "rounds": ROUNDS}, "worst": worst, "rows": rows})


def race(contenders: dict[str, Callable[[Tensor], Tensor]], x: Tensor) -> dict[str, float]:
    """Median seconds per call of each contender; each round times all of them on enough calls to take about 10 ms."""
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    with torch.no_grad():
        for call in contenders.values():
            for _ in range(5):
                call(x)
        started = perf_counter()
        for _ in range(10):
            contenders["by_hand"](x)
        repeats = max(3, int(0.01 / ((perf_counter() - started) / 10)))
        for number in range(ROUNDS):
            order = list(contenders) if number % 2 else list(contenders)[::-1]
            for name in order:
                call = contenders[name]
                started = perf_counter()
                for _ in range(repeats):
                    call(x)
                samples[name].append((perf_counter() - started) / repeats)
    return {name: median(values) for name, values in samples.items()}


if __name__ == "__main__":
    main()
