"""SmolLM2-135M at few bits per weight, everything counted: ours stage by stage against GPTQ and round to nearest.

    python benchmarks/geometry_bits.py [--bits 4.5 3.5 3.0 2.5] [--resume]

All contenders see the same calibration windows. GPTQ has at least the bytes of the budget (its formats are those of
``FORMATS``). Ours: dense integer formats allocated by measured sensitivity (``allocated``), realised behind the compressed
prefix (``propagated``), then scales, offsets and norms trained by distillation on the same calibration windows (``healed``).
Held-out windows are only ever measured; GPTQ's options and the ridge were set beforehand. ``seconds`` are the processor's.
"""

from __future__ import annotations

import argparse
from time import process_time
from typing import Any

import torch
from common import LENGTH, MODEL, Lines, original_layers
from geometry_common import CALIBRATION, HELDOUT, VALIDATION, Language, Rows, qualities
from geometry_peers import GPTQ, quantise_model

import tensornet_compress as tnc
from tensornet_compress.compressing import model_nbytes, survey_model
from tensornet_compress.nn import find_targets, layer_weight
from tensornet_compress.nn.plan import PLAN_ATTRIBUTE
from tensornet_compress.train import Propagation, heal, propagate

FORMATS = {4.5: "int4g64o", 3.5: "int3g64o", 3.0: "int3g0z", 2.5: "int2g64o"}
PEER = GPTQ(mse=True)
SETTINGS = Propagation(precision="bfloat16")
HEAL_EPOCHS, HEAL_RATE = 3, 3e-3


class Contest:
    def __init__(self, arguments: argparse.Namespace):
        self.language = Language.load()
        self.references = self.language.references()
        self.model = self.language.model()
        targets = find_targets(self.model)[0]
        self.weights = sum(layer_weight(self.model.get_submodule(target.name)).numel() for target in targets)
        self.others = model_nbytes(self.model) - 4 * self.weights
        settings = {
            "model": MODEL,
            "length": LENGTH,
            "windows": {"calibration": CALIBRATION, "validation": VALIDATION, "held-out": HELDOUT},
            "gptq": vars(PEER),
            "propagation": SETTINGS.model_dump(),
            "heal_epochs": HEAL_EPOCHS,
        }
        self.rows = Rows("geometry_bits", settings, arguments.resume)
        self.survey: Any = None
        self.propagated, self.healed = arguments.propagate, arguments.heal

    def record(self, method: str, bits: float, model: Any, started: float, **more: Any) -> None:
        seconds = process_time() - started
        nbytes = model_nbytes(model) - self.others
        chosen = self.references if method != "gptq" else {"heldout": self.references["heldout"]}
        quality = qualities(model, chosen)
        row = {"method": method, "budget_bits_per_weight": bits, "bits_per_weight": 8 * nbytes / self.weights}
        self.rows.add(**row, seconds=seconds, **quality, **more)

    def missing(self, method: str, bits: float) -> bool:
        return not self.rows.has(method=method, budget_bits_per_weight=bits)

    def round_to_nearest(self, bits: float) -> None:
        started = process_time()
        budget = tnc.Budget(bits_per_weight=bits + 0.1)
        with original_layers(self.model):
            tnc.compress(self.model, budget, method="dense", formats=[FORMATS[bits]], allocator="uniform", workers=1)
            self.record("rtn", bits, self.model, started)

    def gptq(self, bits: float) -> None:
        started = process_time()
        settings = GPTQ(**(vars(PEER) | {"fmt": FORMATS[bits]}))
        with original_layers(self.model):
            quantise_model(self.model, self.language.calibration, settings, torch.bfloat16)
            self.record("gptq", bits, self.model, started)

    def ours(self, bits: float) -> None:
        batches = self.language.calibration
        started = process_time()
        if self.survey is None:
            self.survey = survey_model(self.model, batches, method="dense", workers=1, progress=Lines())
        with original_layers(self.model):
            budget = tnc.Budget(bits_per_weight=bits)
            tnc.compress(self.model, budget, batches, method="auto", survey=self.survey, refine=0, workers=1, progress=Lines())
            plan = getattr(self.model, PLAN_ATTRIBUTE)
            if self.missing("allocated", bits):
                self.record("allocated", bits, self.model, started)
        if bits not in self.propagated:
            return
        with original_layers(self.model):
            started = process_time()
            reports = propagate(self.model, plan, batches, SETTINGS, Lines())
            self.record(
                "propagated",
                bits,
                self.model,
                started,
                propagation=SETTINGS.model_dump(),
                blocks=[report.model_dump() for report in reports],
            )
            if bits not in self.healed:
                return
            started = process_time()
            halves = [half for batch in batches for half in batch.split(1)]
            report = heal(
                self.model,
                halves,
                teacher=self.language.model(),
                steps=HEAL_EPOCHS * len(halves),
                validation=[self.language.validation[:2]],
                every=len(halves),
                rate=HEAL_RATE,
                precision=torch.bfloat16,
                cache_teacher=True,
                progress=Lines(),
            )
            self.record("healed", bits, self.model, started, heal=report.model_dump(exclude={"losses"}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bits", type=float, nargs="+", default=list(FORMATS), choices=list(FORMATS))
    parser.add_argument("--skip-ours", action="store_true", help="only GPTQ and round to nearest")
    parser.add_argument("--propagate", type=float, nargs="*", default=list(FORMATS), help="sizes to propagate at")
    parser.add_argument("--heal", type=float, nargs="*", default=list(FORMATS), help="sizes to heal at")
    parser.add_argument("--resume", action="store_true", help="keep the rows of the result file")
    arguments = parser.parse_args()
    contest = Contest(arguments)
    for bits in arguments.bits:
        if contest.missing("rtn", bits):
            contest.round_to_nearest(bits)
        unmade = contest.missing("allocated", bits) or (bits in arguments.propagate and contest.missing("propagated", bits))
        if unmade and not arguments.skip_ours:
            contest.ours(bits)
        if contest.missing("gptq", bits):
            contest.gptq(bits)


if __name__ == "__main__":
    main()
