"""Quality at equal bytes: every method against round-to-nearest, everything counted.

    python benchmarks/weights_table.py [--bits 4.5 3.5 2.5] [--methods dense svd ...]

One survey of the model serves all rows. To keep the run short, trains and trees are not refined by ALS, and only ``dense``
and ``auto`` measure sensitivities anew at the compressed model (``refine`` in each row). Rows are written as they come, and
``--resume`` makes only those that the result file lacks.
"""

from __future__ import annotations

import argparse
import json
from time import perf_counter
from typing import Any

from common import LENGTH, MODEL, RESULTS, Lines, language_inputs, original_layers, write_result
from torch import Tensor

import tensornet_compress as tnc
from tensornet_compress.compressing import survey_model
from tensornet_compress.evaluate import Reference, evaluate_language

METHODS = ("dense", "auto", "svd", "ttm", "tt", "tree")
ROUND_TO_NEAREST = {4.5: "int4g64o", 3.5: "int3g64o", 2.5: "int2g64o"}
REFINE = {"dense": 2, "auto": 2}
WINDOWS = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bits", type=float, nargs="+", default=list(ROUND_TO_NEAREST), choices=list(ROUND_TO_NEAREST))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--resume", action="store_true", help="keep the rows of the result file")
    arguments = parser.parse_args()
    model, _, batches, heldout = language_inputs(WINDOWS)
    reference = Reference(model, heldout)
    dense = evaluate_language(model, heldout, reference)
    stored = RESULTS / "weights_table.json"
    rows: list[dict[str, Any]] = json.loads(stored.read_text())["rows"] if arguments.resume and stored.exists() else []

    def missing(label: str) -> list[float]:
        done = {row["budget_bits_per_weight"] for row in rows if row["method"] == label}
        return [bits for bits in arguments.bits if bits not in done]

    def record(label: str, bits: float, calibration: list[Tensor] | None = None, **options: Any) -> None:
        refine = REFINE.get(label, 0)
        started = perf_counter()
        with original_layers(model):
            report = tnc.compress(
                model, tnc.Budget(bits_per_weight=bits), calibration, refine=refine, progress=Lines(), **options
            )
            seconds = perf_counter() - started
            quality = evaluate_language(model, heldout, reference)
        row = {
            "method": label,
            "budget_bits_per_weight": bits,
            "refine": refine,
            "seconds": seconds,
            "notes": list(report.notes),
        }
        rows.append(row | {k: v for k, v in report.summary().items() if k != "seconds"} | quality.model_dump())
        print(
            f"{label:6} {report.bits_per_weight:.3f} bits: KL {quality.kl:.4f} perplexity {quality.perplexity:.2f}", flush=True
        )
        content = {"model": MODEL, "dense": dense.model_dump(), "rows": rows}
        settings = {
            "windows": WINDOWS,
            "length": LENGTH,
            "calibration_windows": 32,
            "round_to_nearest": ROUND_TO_NEAREST,
            "sweeps": 0,
        }
        write_result("weights_table", content | {"settings": settings})

    for bits in missing("rtn"):
        record("rtn", bits, method="dense", formats=[ROUND_TO_NEAREST[bits]], allocator="uniform")
    survey = survey_model(model, batches, method="auto", sweeps=0, progress=Lines())
    print(survey.seconds, flush=True)
    for method in arguments.methods:
        for bits in missing(method):
            try:
                record(method, bits, batches, method=method, survey=survey)
            except tnc.TensorNetError as error:
                rows.append({"method": method, "budget_bits_per_weight": bits, "failed": str(error)})
                print(method, bits, "failed:", error, flush=True)


if __name__ == "__main__":
    main()
