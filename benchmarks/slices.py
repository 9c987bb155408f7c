"""What is a part of a stored field read in, beside all of it? The least time of several tries.

Fields of 64 x 128 x 128 are searched at 0.1 % and saved; then parts of them are read with ``tnc.open_tensor``: from a file that
is opened anew, whose cores are then decoded from their entropy code, and from an array that has been read from before.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from experiments import experiment

import tensornet_compress as tnc
from tensornet_compress.bench.harness import ERROR, STORED, Job
from tensornet_compress.bench.tensors import TENSORS
from tensornet_compress.report import Measure

FIELDS, MAX_ERROR, TRIES = ("wave-large", "heat-large"), 1e-3, 15
FOLDER = tempfile.TemporaryDirectory()
PARTS: dict[str, Any] = {
    "all of it": ...,
    "one snapshot [20]": np.s_[20],
    "one plane [:, :, 64]": np.s_[:, :, 64],
    "a box [10:20, 32:64, 32:64]": np.s_[10:20, 32:64, 32:64],
    "one point over time [:, 40, 70]": np.s_[:, 40, 70],
    "one entry [20, 40, 70]": np.s_[20, 40, 70],
}
MEASURES = {
    "first": Measure(title="file opened anew", unit="s", better="lower"),
    "time": Measure(title="open before", unit="s", better="lower"),
    "share": Measure(
        title="share of a full decode", better="lower", explanation="Time when open before / that of all of it from a file."
    ),
    "error": ERROR,
    "nbytes": STORED,
}


@cache
def stored(name: str) -> tuple[Path, np.ndarray]:
    field = TENSORS[name].load()
    path = Path(FOLDER.name) / f"{name}.tnz"
    tnc.save_network(tnc.search(field, max_error=MAX_ERROR, time_budget=600).best, path)
    return path, field.numpy()


def least(work: Callable[[], object]) -> float:
    times = []
    for _ in range(TRIES):
        began = perf_counter()
        work()
        times.append(perf_counter() - began)
    return min(times)


@cache
def full_decode(name: str) -> float:
    path, _ = stored(name)
    return least(lambda: np.asarray(tnc.open_tensor(path)))


def row(name: str, part: str) -> dict[str, Any]:
    path, field = stored(name)
    key = PARTS[part]
    array = tnc.open_tensor(path)
    first, time, read = least(lambda: tnc.open_tensor(path)[key]), least(lambda: array[key]), array[key]
    error = float(np.linalg.norm(read - field[key]) / max(np.linalg.norm(field[key]), 1e-30))
    nbytes = float(path.stat().st_size)
    return {"values": {"first": first, "time": time, "share": time / full_decode(name), "error": error, "nbytes": nbytes}}


def jobs() -> Iterator[Job]:
    for name in FIELDS:
        for part in PARTS:
            yield Job("search", TENSORS[name].title, part, partial(row, name, part), ours=True, budget=MAX_ERROR)


if __name__ == "__main__":
    experiment(jobs(), MEASURES, {"max_error": MAX_ERROR, "tries": TRIES})
