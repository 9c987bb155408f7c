"""What the experiments share: each is a list of jobs, whose rows become one result as those of ``tensornet-compress bench`` do.

``python benchmarks/NAME.py [--only REGEX] [--overwrite]`` makes the rows that ``benchmarks/results/NAME.json`` lacks.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import mean
from time import perf_counter
from typing import Any

import torch

from tensornet_compress.bench.harness import Harness, Job, start
from tensornet_compress.bench.metrics import TOKEN_METRICS
from tensornet_compress.report import Measure, Row

RESULTS = Path(__file__).parent / "results"
LANGUAGE, ENCODER = "smollm2-135m", "all-minilm-l6-v2"
TIME = Measure(title="time", unit="s", better="lower")
KL = TOKEN_METRICS["kl"].measure


def experiment(
    jobs: Iterable[Job],
    measures: Mapping[str, Measure],
    settings: Mapping[str, Any],
    summary: Callable[[Sequence[Row]], Iterable[Row]] = lambda rows: (),
) -> None:
    """Make the rows of the script that runs, on one thread. ``summary``: rows made of all the others at the end."""
    parser = argparse.ArgumentParser(description=sys.modules["__main__"].__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", default="", help="make only rows whose 'subject: method' this matches")
    parser.add_argument("--overwrite", action="store_true", help="make all rows again")
    options = parser.parse_args()
    torch.set_num_threads(1)
    name, began = Path(sys.argv[0]).stem, perf_counter()
    path = RESULTS / f"{name}.json"
    if options.overwrite:
        path.unlink(missing_ok=True)
    command = " ".join(["python", f"benchmarks/{name}.py", *sys.argv[1:]])
    harness = Harness(start(name, command, dict(settings) | {"threads": 1}, dict(measures), path, resume=True), path, say=print)
    harness.run(name, [job for job in jobs if re.search(options.only, f"{job.subject}: {job.method}")])
    for row in summary(harness.result.rows):
        harness.record(row)
    harness.finish(perf_counter() - began)


def seeded(subject: str, seed: int) -> str:
    """The subject of one of several seeds; tables take means over them."""
    return f"{subject}, seed {seed}"


def means(rows: Sequence[Row], subject: str) -> Iterator[Row]:
    """A row for every method and size: the values that all of ``rows`` of it have, as means over subjects."""
    groups: dict[tuple[str, float | None], list[Row]] = {}
    for row in rows:
        if row.skipped is None:
            groups.setdefault((row.method, row.budget), []).append(row)
    for same in groups.values():
        shared = [name for name in same[0].values if name != "seconds" and all(name in row.values for row in same)]
        values = {name: mean(row.values[name] for row in same) for name in shared}
        yield same[0].model_copy(update={"subject": subject, "values": values, "seed": None, "settings": {}, "note": ""})
