"""What a search costs: seconds and peak memory by size of a matrix and by number of modes, with a plot.

    python benchmarks/search_cost.py [--largest 4096]

Every search (null control included) runs in a process of its own with one thread. Matrices have singular values that fall as
1 / sqrt(k), as those of weights do; the 1536 x 576 one is SmolLM2's. Modes of 2 hold a planted tree. Peak memory is that of the
process less what it held before the search; ``processor_seconds`` tells whether anything else kept it waiting.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
from time import perf_counter, process_time
from typing import Any

import torch
from common import MODEL, RESULTS, write_result
from search_trees import planted
from torch import Tensor

import tensornet_compress as tnc

BUDGET = 600.0
ERROR = 0.1
THREADS = 1


def falling(rows: int, columns: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    rank = min(rows, columns, 1024)
    left = torch.randn(rows, rank, generator=generator)
    right = torch.randn(rank, columns, generator=generator)
    low = left * torch.arange(1, rank + 1).rsqrt() @ right
    return low / low.norm() + 0.5 * torch.randn(rows, columns, generator=generator) / (rows * columns) ** 0.5


def tensor_of(name: str) -> Tensor:
    if name == "weight":
        from tensornet_compress.inputs import load_causal_lm

        found: Tensor = load_causal_lm(MODEL).model.layers[10].mlp.up_proj.weight.detach().float().contiguous()
        return found
    kind, *sizes = name.split("-")
    return planted(0, int(sizes[0]))[0] if kind == "modes" else falling(int(sizes[0]), int(sizes[1]))


def one(name: str) -> None:
    """Search in this process and print what it took."""
    torch.set_num_threads(THREADS)
    tensor = tensor_of(name)
    tnc.search(torch.randn(32, 32), max_error=ERROR)
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began, busy = perf_counter(), process_time()
    result = tnc.search(tensor, max_error=1e-4 if name.startswith("modes") else ERROR, time_budget=BUDGET)
    seconds = perf_counter() - began
    row = {"tensor": name, "shape": list(tensor.shape), "entries": tensor.numel(), "seconds": seconds}
    row["processor_seconds"] = process_time() - busy
    row["peak_bytes"] = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - held)
    row |= {"finished": result.finished, "unfoldings": result.unfoldings, "family": result.choice.family}
    print(json.dumps(row | {"nbytes": result.best.nbytes, "dense_nbytes": 4 * tensor.numel()}))


def draw(rows: list[dict[str, Any]]) -> None:
    """Seconds and memory over size, seconds over modes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.2), layout="constrained")
    size, memory, modes = figure.subplots(1, 3)
    matrices = [row for row in rows if "skipped" not in row and not row["tensor"].startswith("modes")]
    matrices.sort(key=lambda row: row["entries"])
    trees = [row for row in rows if "skipped" not in row and row["tensor"].startswith("modes")]
    entries = [row["entries"] for row in matrices]
    size.loglog(entries, [row["seconds"] for row in matrices], "o-")
    size.set(xlabel="entries of a matrix", ylabel="seconds")
    memory.loglog(entries, [row["peak_bytes"] / 2**20 for row in matrices], "o-", label="peak")
    memory.loglog(entries, [4 * count / 2**20 for count in entries], "--", color="grey", label="the matrix")
    memory.set(xlabel="entries of a matrix", ylabel="MiB")
    memory.legend(fontsize=8)
    modes.semilogy([len(row["shape"]) for row in trees], [row["seconds"] for row in trees], "o-")
    modes.set(xlabel="modes of size 2", ylabel="seconds")
    figure.savefig(RESULTS / "search_cost.svg", metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--one", help="search one tensor in this process")
    parser.add_argument("--only", nargs="+", help="only these tensors; other rows stay")
    parser.add_argument("--largest", type=int, default=4096)
    arguments = parser.parse_args()
    if arguments.one:
        one(arguments.one)
        return
    names = [f"matrix-{n}-{n}" for n in (64, 128, 256, 512, 1024, 2048, 4096) if n <= arguments.largest]
    names = ["weight", *names[:5], *(f"modes-{m}" for m in (6, 8, 10, 12, 14, 16)), *names[5:]]
    path = RESULTS / "search_cost.json"
    rows: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []
    for name in arguments.only or names:
        done = subprocess.run([sys.executable, __file__, "--one", name], capture_output=True, text=True, check=False)
        lines = done.stdout.strip().splitlines()
        row = json.loads(lines[-1]) if not done.returncode else {"tensor": name, "skipped": done.stderr[-500:]}
        rows = sorted([r for r in rows if r["tensor"] != name] + [row], key=lambda r: names.index(r["tensor"]))
        print(row, flush=True)
        write_result("search_cost", {"settings": {"error": ERROR, "budget": BUDGET, "threads": THREADS}, "rows": rows})
        draw(rows)


if __name__ == "__main__":
    main()
