"""Truncation alone (bf16 cores, no integers): our allocation of ranks against the uniform SVD-LLM baseline.

python benchmarks/weights_ranks.py
"""

from __future__ import annotations

import copy

from common import LENGTH, MODEL, Lines, language_inputs, original_layers, write_result

import tensornet_compress as tnc
from tensornet_compress.compression import survey_model
from tensornet_compress.evaluate import Reference, evaluate_language

KEEP = (0.8, 0.6)
WINDOWS = 16


def main() -> None:
    model, _, batches, heldout = language_inputs(WINDOWS)
    reference = Reference(model, heldout)
    dense = evaluate_language(model, heldout, reference)
    print("dense", dense, flush=True)
    survey = survey_model(model, batches, method="svd", formats=["bf16"], progress=Lines())
    rows = []
    for keep in KEEP:
        for allocator in ("uniform", "energy", "sensitivity"):
            with original_layers(model):
                shared = copy.copy(survey) if allocator != "uniform" else None
                report = tnc.compress(
                    model,
                    tnc.Budget(bits_per_weight=16 * keep),
                    batches,
                    method="svd",
                    formats=["bf16"],
                    allocator=allocator,
                    survey=shared,
                    progress=Lines(),
                )
                quality = evaluate_language(model, heldout, reference)
            excess = quality.cross_entropy - dense.cross_entropy
            row = {"keep": keep, "allocator": allocator, "excess_cross_entropy": excess}
            rows.append(row | report.summary() | quality.model_dump())
            print(keep, allocator, f"{report.bits_per_weight:.3f} bits", quality, flush=True)
        base, ours = rows[-3]["excess_cross_entropy"], rows[-1]["excess_cross_entropy"]
        print(f"keep {keep}: excess cross-entropy {ours:.4f} / baseline {base:.4f} = {ours / base:.3f}", flush=True)
    write_result(
        "weights_ranks",
        {
            "model": MODEL,
            "settings": {"windows": WINDOWS, "length": LENGTH, "calibration_windows": 32, "formats": ["bf16"]},
            "dense": dense.model_dump(),
            "rows": rows,
            "ratio_of_excess": {
                str(keep): next(
                    r["excess_cross_entropy"] for r in rows if r["keep"] == keep and r["allocator"] == "sensitivity"
                )
                / next(r["excess_cross_entropy"] for r in rows if r["keep"] == keep and r["allocator"] == "uniform")
                for keep in KEEP
            },
        },
    )


if __name__ == "__main__":
    main()
