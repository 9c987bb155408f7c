"""Truncation alone (bf16 cores, no integers) with the whole pipeline: allocation, propagation, refinement, healing.

    python benchmarks/geometry_ranks.py [--keep 0.8 0.6] [--stages allocated refined healed] [--resume] [--scratch FOLDER]

The baseline is the uniform SVD-LLM row of ``weights_ranks.json`` (same held-out and calibration windows): ``ratio_to_uniform``
is the excess cross-entropy over the dense model's, over the baseline's. Blocks are fitted and refined on the calibration
windows alone; healing distils the dense model on ``HEALING`` windows of the calibration articles, each seen once. Held-out
windows are only ever measured. ``pivots``: two cores kept by pivots are among the options. ``seconds`` are the processor's.
"""

from __future__ import annotations

import argparse
import json
from math import exp, log
from pathlib import Path
from time import process_time
from typing import Any

import torch
from common import LENGTH, MODEL, RESULTS, Lines, original_layers
from geometry_common import Rows, qualities

import tensornet_compress as tnc
from tensornet_compress.compressing import survey_model
from tensornet_compress.evaluate import Reference
from tensornet_compress.inputs import calibration_windows, heldout_windows, load_causal_lm, load_tokenizer
from tensornet_compress.nn import NetworkModule, find_targets, layer_weight
from tensornet_compress.nn.plan import PLAN_ATTRIBUTE, Plan
from tensornet_compress.options.forms import SIZE_SHARES
from tensornet_compress.train import BlockRefinement, Propagation, heal, propagate

KEEPS = (0.8, 0.6)
FORMATS = {"two cores": ["bf16"], "pivots": ["bf16", "bf16p"]}
STAGES = ("allocated", "propagated", "refined", "healed")
CALIBRATION, VALIDATION, HELDOUT = 32, 4, 8
REFINE = 1
POOL = 392
HEALING = {0.8: 98, 0.6: 196}
HEAL_RATE = 2e-3
SETTINGS = Propagation(precision="bfloat16")
REFINED = SETTINGS.model_copy(update={"refinement": BlockRefinement(epochs=2, rate=1.5e-3)})


class Contest:
    def __init__(self, arguments: argparse.Namespace):
        torch.set_num_threads(1)
        tokenizer = load_tokenizer(MODEL)
        windows = calibration_windows(tokenizer, LENGTH, POOL + VALIDATION)
        self.windows, self.validation = windows[:-VALIDATION], windows[-VALIDATION:]
        self.model = self.dense()
        heldout = heldout_windows(tokenizer, LENGTH, HELDOUT)
        self.references = {"validation": Reference(self.model, self.validation), "heldout": Reference(self.model, heldout)}
        self.perplexity = exp(cross_entropy(self.references["heldout"]))
        chosen = find_targets(self.model)[0]
        self.names = [target.name for target in chosen]
        self.weights = sum(layer_weight(self.model.get_submodule(name)).numel() for name in self.names)
        self.baseline = {
            row["keep"]: row["excess_cross_entropy"]
            for row in json.loads((RESULTS / "weights_ranks.json").read_text())["rows"]
            if row["allocator"] == "uniform"
        }
        settings = {
            "model": MODEL,
            "length": LENGTH,
            "windows": {"calibration": CALIBRATION, "validation": VALIDATION, "held-out": HELDOUT},
            "healing_windows": {str(keep): count for keep, count in HEALING.items()},
            "heal_rate": HEAL_RATE,
            "propagation": REFINED.model_dump(),
            "dense_perplexity": self.perplexity,
            "uniform_excess": self.baseline,
        }
        self.rows = Rows("geometry_ranks", settings, arguments.resume)
        self.stages = arguments.stages
        self.scratch = None if arguments.scratch is None else Path(arguments.scratch)
        self.storage = "two cores"
        self.survey: Any = None
        self.halved: Any = None

    @staticmethod
    def dense() -> Any:
        return load_causal_lm(MODEL, torch.float32)

    def missing(self, keep: float, stage: str) -> bool:
        return stage in self.stages and not self.rows.has(keep=keep, storage=self.storage, stage=stage)

    def record(self, keep: float, stage: str, model: Any, seconds: float, **more: Any) -> None:
        quality = qualities(model, self.references)
        excess = log(quality["heldout_perplexity"] / self.perplexity)
        modules = [model.get_submodule(name) for name in self.names]
        nbytes = sum(module.nbytes for module in modules if isinstance(module, NetworkModule))
        row = {"keep": keep, "storage": self.storage, "stage": stage, "bits_per_weight": 8 * nbytes / self.weights}
        self.rows.add(
            **row,
            excess_cross_entropy=excess,
            ratio_to_uniform=excess / self.baseline[keep],
            seconds=seconds,
            **quality,
            **more,
        )

    def plan(self, keep: float) -> Plan:
        """Ranks by measured sensitivity, measured anew at the compressed model."""
        stored = None if self.scratch is None else self.scratch / f"plan-{keep:g}-{self.storage}.json"
        if stored is not None and stored.exists() and not self.missing(keep, "allocated"):
            return Plan.model_validate_json(stored.read_text())
        started = process_time()
        batches = list(self.windows[:CALIBRATION].split(4))
        if self.survey is None:
            shares = tuple(sorted({*SIZE_SHARES, *KEEPS}))
            chosen: dict[str, Any] = {"method": "svd", "formats": FORMATS[self.storage], "shares": shares}
            # Everything is stored in bf16 anyway, and statistics are summed in float32 and float64 all the same.
            self.halved = load_causal_lm(MODEL, torch.bfloat16)
            self.survey = survey_model(self.halved, batches, workers=1, progress=Lines(), **chosen)
        with original_layers(self.halved):
            budget = tnc.Budget(bits_per_weight=16 * keep)
            options: dict[str, Any] = {"method": "svd", "refine": REFINE, "workers": 1, "progress": Lines()}
            tnc.compress(self.halved, budget, batches, survey=self.survey, **options)
            seconds = process_time() - started
            plan: Plan = getattr(self.halved, PLAN_ATTRIBUTE)
            if stored is not None:
                stored.parent.mkdir(exist_ok=True)
                stored.write_text(plan.model_dump_json())
            if self.missing(keep, "allocated"):
                self.record(keep, "allocated", self.halved, seconds)
        return plan

    def run(self, keep: float) -> None:
        if not any(self.missing(keep, stage) for stage in STAGES):
            return
        refined = None if self.scratch is None else self.scratch / f"refined-{keep:g}-{self.storage}.pt"
        dense = self.model
        if self.missing(keep, "healed") and refined is not None and refined.exists():
            self.model = torch.load(refined, weights_only=False)
        else:
            plan = self.plan(keep)
            with original_layers(dense):
                if self.missing(keep, "propagated"):
                    self.propagate(keep, "propagated", plan, SETTINGS)
            if not self.missing(keep, "refined") and not self.missing(keep, "healed"):
                return
            self.model = self.dense()
            self.propagate(keep, "refined", plan, REFINED)
            if refined is not None:
                torch.save(self.model, refined)
        if self.missing(keep, "healed"):
            self.heal(keep, dense)
        self.model = dense

    def propagate(self, keep: float, stage: str, plan: Plan, settings: Propagation) -> None:
        started = process_time()
        batches = list(self.windows[:CALIBRATION].split(1))
        reports = propagate(self.model, plan, batches, settings, Lines())
        errors = [report.fitted if report.refined is None else report.refined for report in reports]
        corrections = [list(report.corrections.values()) for report in reports]
        self.rows.drop(keep=keep, storage=self.storage, stage=stage)
        self.record(keep, stage, self.model, process_time() - started, blocks=errors, corrections=corrections)

    def heal(self, keep: float, teacher: Any) -> None:
        started = process_time()
        batches = list(self.windows[: HEALING[keep]].split(2))
        report = heal(
            self.model,
            batches,
            teacher=teacher,
            steps=len(batches),
            rate=HEAL_RATE,
            validation=[self.validation],
            every=max(1, len(batches) // 8),
            patience=8,
            precision=torch.bfloat16,
            progress=Lines(),
        )
        self.record(keep, "healed", self.model, process_time() - started, heal=report.model_dump(exclude={"losses"}))


def cross_entropy(reference: Reference) -> float:
    """Of the reference model itself on its windows."""
    nll = [
        -log_p.float().gather(-1, windows[:, 1:, None])
        for log_p, windows in zip(reference.log_probabilities, reference.windows.split(reference.batch))
    ]
    return float(torch.cat(nll).double().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--keep", type=float, nargs="+", default=list(KEEPS), choices=KEEPS)
    parser.add_argument("--stages", nargs="+", default=list(STAGES), choices=STAGES)
    parser.add_argument("--storage", nargs="+", default=list(FORMATS), choices=FORMATS)
    parser.add_argument("--scratch", help="a folder to keep allocations and refined models in, so that a later run goes on")
    parser.add_argument("--resume", action="store_true", help="keep the rows of the result file")
    arguments = parser.parse_args()
    contest = Contest(arguments)
    for storage in arguments.storage:
        contest.storage, contest.survey = storage, None
        for keep in arguments.keep:
            contest.run(keep)


if __name__ == "__main__":
    main()
