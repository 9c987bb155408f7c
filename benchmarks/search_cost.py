"""What a search costs: seconds and peak memory by size of a matrix and by number of modes.

Every search (null control included) runs in a process of its own with one thread. Matrices have singular values that fall as
1 / sqrt(k), as those of weights do; the 1536 x 576 one is SmolLM2's. Modes of 2 hold a planted tree.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from experiments import TIME, experiment
from search_trees import planted
from torch import Tensor

import tensornet_compress as tnc
from tensornet_compress.bench.harness import STORED, Job
from tensornet_compress.bench.processes import cost_apart
from tensornet_compress.bench.speed import MEASURES as SPEED
from tensornet_compress.bench.tensors import TENSORS
from tensornet_compress.report import Measure

SIZES, MODES = (64, 128, 256, 512, 1024, 2048, 4096), (6, 8, 10, 12, 14, 16)
SECONDS, ERROR, TREE_ERROR = 600.0, 0.1, 1e-4
MEASURES = {
    "time": TIME,
    "processor_seconds": Measure(title="processor seconds", unit="s", better="lower"),
    "peak_nbytes": SPEED["peak_nbytes"],
    "unfoldings": Measure(title="unfoldings"),
    "nbytes": STORED,
}


def weight() -> Tensor:
    return TENSORS["smollm2-up_proj"].load()


def tree(modes: int) -> Tensor:
    return planted(0, modes)[0]


def falling(size: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    rank = min(size, 1024)
    left = torch.randn(size, rank, generator=generator)
    right = torch.randn(rank, size, generator=generator)
    low = left * torch.arange(1, rank + 1).rsqrt() @ right
    return low / low.norm() + 0.5 * torch.randn(size, size, generator=generator) / size


def prepared(make: Callable[[], Tensor], error: float) -> Callable[[], dict[str, Any]]:
    tensor = make()
    tnc.search(torch.randn(32, 32), max_error=ERROR)  # what the first search of a process loads is not of this one

    def work() -> dict[str, Any]:
        result = tnc.search(tensor, max_error=error, time_budget=SECONDS)
        values = {"unfoldings": result.unfoldings, "nbytes": result.best.nbytes}
        return {"values": values, "settings": {"finished": result.finished, "family": result.choice.family}}

    return work


def row(make: Callable[[], Tensor], error: float) -> dict[str, Any]:
    made, cost = cost_apart(prepared, make, error)
    spent = {"time": cost.seconds, "processor_seconds": cost.processor_seconds, "peak_nbytes": cost.peak_nbytes}
    return made | {"values": spent | made["values"]}


def jobs() -> Iterator[Job]:
    yield Job("search", "weight, 1536 x 576", "ours", partial(row, weight, ERROR), ours=True)
    for size in SIZES:
        yield Job("search", f"matrix, {size} x {size}", "ours", partial(row, partial(falling, size), ERROR), ours=True)
    for modes in MODES:
        yield Job("search", f"tree, {modes} modes of 2", "ours", partial(row, partial(tree, modes), TREE_ERROR), ours=True)


if __name__ == "__main__":
    experiment(jobs(), MEASURES, {"error": ERROR, "tree_error": TREE_ERROR, "budget": SECONDS})
