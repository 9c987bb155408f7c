"""``make bench``: every benchmark, one after the other; each writes its own JSON under ``benchmarks/results``.

Last come the full tables of ``tensornet-compress bench`` against peers, which go on where they were stopped.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPTS = (
    "module_speed", "weights_cost", "weights_ranks", "encoder_table", "weights_table",
    "kv_quality", "kv_memory", "kv_speed --no-stock", "kv_generation --no-stock", "kv_token_order",
    "search_trees", "search_orders", "search_entries", "search_free_orders", "search_real", "search_cost",
    "geometry_units", "geometry_claims", "geometry_claims_real", "geometry_encoder", "geometry_gptq", "geometry_bits",
    "geometry_ranks", "geometry_networks", "geometry_cost",
)  # fmt: skip
BENCHES = {
    "bench_weights_smollm2": ("weights",),
    "bench_weights_minilm": ("weights", "--model", "all-minilm-l6-v2"),
    "bench_kv_smollm2": ("kv",),
    "bench_search": ("search",),
    "bench_speed": ("speed",),
}


def command(script: str) -> list[str]:
    """What runs a script with its options."""
    name, *options = script.split()
    return [sys.executable, str(Path(__file__).parent / f"{name}.py"), *options]


def main() -> int:
    failed = []
    for name in SCRIPTS:
        print(f"== {name}", flush=True)
        if subprocess.run(command(name), check=False).returncode:
            failed.append(name)
    for name, options in BENCHES.items():
        print(f"== {name}", flush=True)
        result = Path(__file__).parent / "results" / f"{name}.json"
        bench = [sys.executable, "-m", "tensornet_compress.cli", "bench", *options, "--json", str(result), "--resume"]
        if subprocess.run(bench, check=False).returncode:
            failed.append(name)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return len(failed)


if __name__ == "__main__":
    raise SystemExit(main())
