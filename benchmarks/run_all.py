"""``make bench``: every benchmark, one after the other; each writes its own JSON under ``benchmarks/results`` and goes on where
it was stopped, or with ``--overwrite`` makes all rows again, which results of other settings need."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(os.path.relpath(Path(__file__).parent))  # results name no folder of the machine
ENCODER = "all-minilm-l6-v2"
VARIANTS = ("--plugin", str(HERE / "variants.py"), "--methods")
BENCHES = {
    "bench_weights_smollm2": ("weights",),
    "bench_weights_minilm": ("weights", "--model", ENCODER),
    "bench_model_smollm2": ("model",),
    "bench_kv_smollm2": ("kv",),
    "bench_kv_reference": ("kv", "--text", "python-reference"),
    "bench_search": ("search",),
    "bench_speed": ("speed",),
    "stages_minilm": (
        "weights", "--model", ENCODER, "--bits", "4.5,3.5,3,2.5",
        *VARIANTS, "ours-dense,ours-propagated-plain,ours-propagated,ours-refined,ours-healed",
    ),
    "stages_smollm2": (
        "weights", "--bits", "12.8,9.6",
        *VARIANTS, "svd-llm,ours-energy,ours-bf16,ours-bf16-refined,ours-bf16-healed,ours-pivots,ours-pivots-refined",
    ),
    "kv_metrics": (
        "kv", "--bits", "2,1.25", *VARIANTS,
        "ours-storage,ours-storage-queries,ours-storage-euclidean,ours-live,ours-live-queries,ours-live-euclidean",
    ),
}  # fmt: skip
EXPERIMENTS = (
    "kv_generation", "search_trees", "search_orders", "search_entries", "search_cost", "free_orders", "claims", "networks",
    "stage_cost", "rate_bound", "slices", "gguf_export", "lm_eval_tasks", "ocr", "scale",
)  # fmt: skip


def commands() -> dict[str, list[str]]:
    """What makes each result."""
    bench = [sys.executable, "-m", "tensornet_compress", "bench"]
    made = {
        name: [*bench, *options, "--json", str(HERE / "results" / f"{name}.json"), *(sys.argv[1:] or ["--resume"])]
        for name, options in BENCHES.items()
    }
    return made | {name: [sys.executable, str(HERE / f"{name}.py"), *sys.argv[1:]] for name in EXPERIMENTS}


def main() -> int:
    failed = []
    for name, command in commands().items():
        print(f"== {name}", flush=True)
        if subprocess.run(command, check=False).returncode:
            failed.append(name)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return len(failed)


if __name__ == "__main__":
    raise SystemExit(main())
