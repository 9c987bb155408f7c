"""``make bench``: every benchmark, one after the other; each writes its own JSON under ``benchmarks/results``.

Last comes ``tensornet-compress bench all``, the full tables against peers, which goes on where it was stopped.
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
    print("== bench all", flush=True)
    result = Path(__file__).parent / "results" / "bench_all.json"
    bench = [sys.executable, "-m", "tensornet_compress.cli", "bench", "all", "--json", str(result), "--resume"]
    if subprocess.run(bench, check=False).returncode:
        failed.append("bench all")
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return len(failed)


if __name__ == "__main__":
    raise SystemExit(main())
