"""One run of ``scale.py``, in a process of its own, which imports what a user's process would."""

from __future__ import annotations

import json
import time
from pathlib import Path

import torch

import tensornet_compress as tnc
from tensornet_compress.compressing.cluster import cluster
from tensornet_compress.inputs import load_causal_lm
from tensornet_compress.memory import peak_of_all

BITS, WINDOWS, LENGTH = 3.5, 8, 256


def run(
    source: str, target: str, memory: int | None, workers: int, where: str | None, in_memory: bool, number: int = WINDOWS
) -> None:
    """Compress ``source`` into ``target``; prints what it took as JSON."""
    torch.set_num_threads(2)
    words = json.loads((Path(source) / "config.json").read_text())["vocab_size"]
    drawn = torch.Generator().manual_seed(1)
    windows = [torch.randint(words, (1, LENGTH), generator=drawn) for _ in range(number)]
    began, budget = time.perf_counter(), tnc.Budget(bits_per_weight=BITS)
    where = where and where.lower()
    if in_memory:
        model = load_causal_lm(source)
        with cluster(where):
            report = tnc.compress(model, budget, windows, workers=workers)
        tnc.save(model, target, report=report)
    else:
        report = tnc.compress_folder(
            source, target, budget, windows, workers=workers if where is None else None, memory=memory, cluster=where
        )
    stages = {"calibrate": 0.0, "survey": 0.0, "make": 0.0}
    for stage, seconds in report.seconds.items():
        stages[stage.split()[0]] += seconds
    taken = {"time": time.perf_counter() - began, "peak_nbytes": peak_of_all()}
    print("\n" + json.dumps(taken | stages))
