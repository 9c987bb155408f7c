"""Memory of a cache as the operating system sees it: one process per cache and length.

python benchmarks/kv_memory.py --profile FOLDER [--lengths 1024 4096 8192]
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import resource
import subprocess
import sys
from typing import Any

import kv_common as common
import torch
from transformers import DynamicCache

import tensornet_compress.kv as kv

KINDS = ("dynamic", "live3", "live2", "storage2")


def resident() -> int:
    """Bytes resident now, free heap pages handed back first."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


@torch.no_grad()
def child(kind: str, length: int, folder: str, chunk: int) -> dict[str, Any]:
    """Fill one cache by chunked prefill of a real text; returns bytes before, after and at the peak."""
    torch.set_num_threads(1)
    model, tokenizer = common.model_and_tokenizer()
    profile = kv.Profile.load(folder)
    ids = common.heldout_ids(tokenizer, 1024, -(-length // 1024)).flatten()[None, :length]
    makers = {
        "dynamic": lambda: DynamicCache(config=model.config),
        "live3": lambda: kv.CompressedCache(model, 3.0, profile),
        "live2": lambda: kv.CompressedCache(model, 2.0, profile),
        "storage2": lambda: kv.CompressedCache(model, 2.0, profile, mode="storage"),
    }
    warm = makers[kind]()
    model(ids[:, :chunk], past_key_values=warm, logits_to_keep=1)
    del warm
    before = resident()
    cache = makers[kind]()
    for start in range(0, length, chunk):
        model(ids[:, start : start + chunk], past_key_values=cache, logits_to_keep=1)
    if kind.startswith("storage"):
        cache.freeze()
    after = resident()
    exact = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers) if kind == "dynamic" else cache.nbytes
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"cache": kind, "tokens": length, "counted_nbytes": exact, "grown_nbytes": after - before, "peak_nbytes": peak}


def main() -> None:
    """Measure and write ``results/kv_memory.json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", required=True)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096, 8192])
    parser.add_argument("--chunk", type=int, default=512)
    parser.add_argument("--child", nargs=2, metavar=("KIND", "LENGTH"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(child(options.child[0], int(options.child[1]), options.profile, options.chunk)))
        return
    rows: list[dict[str, Any]] = []
    for length in options.lengths:
        for kind in KINDS:
            command = [sys.executable, __file__, "--profile", options.profile, "--chunk", str(options.chunk)]
            done = subprocess.run([*command, "--child", kind, str(length)], capture_output=True, text=True, check=True)
            row = json.loads(done.stdout.strip().splitlines()[-1])
            exact = next(r for r in [*rows, row] if r["cache"] == "dynamic" and r["tokens"] == length)
            row["counted_ratio"] = row["counted_nbytes"] / exact["counted_nbytes"]
            row["grown_ratio"] = row["grown_nbytes"] / exact["grown_nbytes"]
            rows.append(row)
            print(row, flush=True)
            common.write("kv_memory", {"rows": rows, "profile_nbytes": kv.Profile.load(options.profile).nbytes})


if __name__ == "__main__":
    main()
