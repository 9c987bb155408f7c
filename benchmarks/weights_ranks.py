"""Truncation alone (bf16 cores, no integers): our allocation of ranks against the uniform SVD-LLM baseline.

python benchmarks/weights_ranks.py
"""

from __future__ import annotations

from typing import Any

from common import LENGTH, MODEL, Lines, language_inputs, original_layers, write_result

import tensornet_compress as tnc
from tensornet_compress.compressing import survey_model
from tensornet_compress.evaluate import Reference, evaluate_language
from tensornet_compress.options.forms import SIZE_SHARES

KEEP = (0.6, 0.8)
WINDOWS = 8
CONTENDERS: dict[str, dict[str, Any]] = {
    "uniform": {"allocator": "uniform"},
    "energy": {"allocator": "energy"},
    "sensitivity": {"refine": 0},
    "sensitivity, refined": {"refine": 2},
}


def main() -> None:
    model, _, batches, heldout = language_inputs(WINDOWS)
    reference = Reference(model, heldout)
    dense = evaluate_language(model, heldout, reference)
    print("dense", dense, flush=True)
    shares = tuple(sorted({*SIZE_SHARES, *KEEP}))
    survey = survey_model(model, batches, method="svd", formats=["bf16"], shares=shares, progress=Lines())
    rows: list[dict[str, Any]] = []
    for keep in KEEP:
        for label, options in CONTENDERS.items():
            budget = tnc.Budget(bits_per_weight=16 * keep)
            with original_layers(model):
                report = tnc.compress(model, budget, batches, method="svd", survey=survey, progress=Lines(), **options)
                quality = evaluate_language(model, heldout, reference)
            excess = quality.cross_entropy - dense.cross_entropy
            row = {"keep": keep, "allocator": label, "excess_cross_entropy": excess}
            uniform = next((r["excess_cross_entropy"] for r in rows if r["keep"] == keep), excess)
            row["ratio_to_uniform"] = excess / uniform
            rows.append(row | report.summary() | quality.model_dump())
            print(keep, label, row["ratio_to_uniform"], f"{report.bits_per_weight:.3f} bits", quality, flush=True)
    write_result(
        "weights_ranks",
        {
            "model": MODEL,
            "settings": {"windows": WINDOWS, "length": LENGTH, "calibration_windows": 32, "formats": ["bf16"]},
            "dense": dense.model_dump(),
            "rows": rows,
        },
    )


if __name__ == "__main__":
    main()
