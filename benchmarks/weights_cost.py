"""What a compression costs and whether its ledger adds up: seconds by stage, peak memory, bytes on disk.

    python benchmarks/weights_cost.py [--bits 4.5] [--method auto]

The bare SVD calls are one thin ``torch.linalg.svd`` per targeted weight, in as many processes as the compression uses.
"""

from __future__ import annotations

import argparse
import os
import resource
import tempfile
from pathlib import Path
from time import perf_counter

import torch
from common import MODEL, Lines, language_inputs, write_result
from torch import Tensor

import tensornet_compress as tnc
from tensornet_compress.cli.main import folder_nbytes
from tensornet_compress.compressing.workers import run_jobs
from tensornet_compress.evaluate.ledger import folder_ledger
from tensornet_compress.inputs import resolve_model


def bare_svd(weight: Tensor) -> float:
    """Seconds of one thin SVD."""
    started = perf_counter()
    torch.linalg.svd(weight, full_matrices=False)
    return perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bits", type=float, default=4.5)
    parser.add_argument("--method", default="auto")
    arguments = parser.parse_args()
    model, tokenizer, batches, _ = language_inputs(windows=1)
    weights = [p.detach().clone() for name, p in model.named_parameters() if p.ndim == 2 and "layers" in name]
    started = perf_counter()
    svd_each = run_jobs(bare_svd, weights)
    svd_wall = perf_counter() - started
    del weights
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = perf_counter()
    report = tnc.compress(
        model,
        tnc.Budget(bits_per_weight=arguments.bits),
        batches,
        method=arguments.method,
        source=Path(resolve_model(MODEL)),
        progress=Lines(),
    )
    seconds = perf_counter() - started
    with tempfile.TemporaryDirectory() as scratch:
        out = tnc.save(model, Path(scratch) / "model", tokenizer, report)
        totals, on_disk = folder_ledger(out).totals(), folder_nbytes(out)
    tensors = totals["compressed layers"] + totals["other tensors"]
    print(f"{seconds:.1f} s; bare SVD calls {svd_wall:.1f} s; ledger {totals['folder']:,} B, on disk {on_disk:,} B", flush=True)
    write_result(
        "weights_cost",
        {
            "model": MODEL,
            "settings": vars(arguments) | {"processes": os.cpu_count(), "calibration_tokens": sum(b.numel() for b in batches)},
            "seconds": {
                "compress": seconds,
                "stages": report.seconds,
                "bare_svd_wall": svd_wall,
                "bare_svd_sum": sum(svd_each),
            },
            "peak_bytes": {
                "before_compress": before * 1024,
                "parent": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
                "largest_worker": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024,
            },
            "model_bytes": report.original_nbytes,
            "summary": report.summary(),
            "ledger": totals,
            "on_disk": on_disk,
            "ledger_equals_disk": totals["folder"] == on_disk,
            "tensor_bytes": tensors,
            "tensor_bytes_equal_report": tensors == report.nbytes,
        },
    )


if __name__ == "__main__":
    main()
