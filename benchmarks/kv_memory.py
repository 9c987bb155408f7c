"""Memory of a cache as the operating system sees it: one process per cache and length.

python benchmarks/kv_memory.py [--profile FOLDER] [--lengths 1024 4096 8192]
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import resource
import subprocess
import sys
from collections.abc import Callable
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
    """Fill one cache chunk by chunk as a forward pass would, then decode two tokens; bytes before, after and at the peak.

    The states are those of a real text of 1024 tokens, repeated: what they hold does not matter here.
    """
    torch.set_num_threads(1)
    model, tokenizer = common.model_and_tokenizer()
    profile = kv.Profile.load(folder)
    ids = common.heldout_ids(tokenizer, 1024, 1)
    source = DynamicCache(config=model.config)
    model(ids, past_key_values=source, logits_to_keep=1)
    states = [(layer.keys.clone(), layer.values.clone()) for layer in source.layers]
    del source
    makers: dict[str, Callable[[], Any]] = {
        "dynamic": lambda: DynamicCache(config=model.config),
        "live3": lambda: kv.CompressedCache(model, 3.0, profile),
        "live2": lambda: kv.CompressedCache(model, 2.0, profile),
        "storage2": lambda: kv.CompressedCache(model, 2.0, profile, mode="storage"),
    }

    def fill(cache: Any, start: int) -> None:
        recorder = getattr(cache, "recorder", None)
        if recorder is not None:
            recorder.seen["positions"] = torch.arange(start, start + chunk)[None]
        where = slice(start % 1024, start % 1024 + chunk)
        for index, (keys, values) in enumerate(states):
            cache.update(keys[:, :, where], values[:, :, where], index)

    warm = makers[kind]()
    fill(warm, 0)
    del warm
    before, peak_before = resident(), peak()
    cache = makers[kind]()
    for start in range(0, length, chunk):
        fill(cache, start)
    for token in ids[0, :2]:
        model(token.view(1, 1), past_key_values=cache, logits_to_keep=1)
    if kind.startswith("storage"):
        cache.freeze()
    after = resident()
    counted = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers) if kind == "dynamic" else cache.nbytes
    return {
        "cache": kind,
        "tokens": length,
        "counted_nbytes": counted,
        "grown_nbytes": after - before,
        "peak_nbytes": peak(),
        "peak_before_nbytes": peak_before,
        "before_nbytes": before,
    }


def peak() -> int:
    """Most bytes this process ever had resident."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    """Measure and write ``results/kv_memory.json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", default=common.PROFILE, help="folder of a profile; made there when missing")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096, 8192])
    parser.add_argument("--chunk", type=int, default=512)
    parser.add_argument("--child", nargs=2, metavar=("KIND", "LENGTH"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(child(options.child[0], int(options.child[1]), options.profile, options.chunk)))
        return
    common.profile(*common.model_and_tokenizer(), options.profile)
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
