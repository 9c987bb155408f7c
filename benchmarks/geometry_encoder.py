"""all-MiniLM-L6-v2 (true fp32 weights) at few bits per weight: ours stage by stage against GPTQ and round to nearest.

    python benchmarks/geometry_encoder.py [--bits 4.5 3.5 3.0 2.5] [--resume]

Judged by one minus the cosine of sentence embeddings to the original's, on held-out sentences. The same calibration sentences
for all; where a stage has variants, the one that is better on validation sentences of the calibration articles goes on
(``kept``).
"""

from __future__ import annotations

import argparse
import copy
from time import process_time
from typing import Any

import torch
from common import Lines
from encoder_table import _encode, _sentences
from geometry_common import Rows
from geometry_peers import GPTQ, quantise_model

import tensornet_compress as tnc
from tensornet_compress.compressing import model_nbytes, survey_model
from tensornet_compress.evaluate import compare_embeddings, sentence_embeddings
from tensornet_compress.inputs import load_encoder, load_tokenizer, wikipedia_articles
from tensornet_compress.nn import KeptModules, find_targets, layer_weight
from tensornet_compress.nn.plan import PLAN_ATTRIBUTE
from tensornet_compress.train import BlockRefinement, Propagation, heal, propagate

MODEL = "all-minilm-l6-v2"
FORMATS = {4.5: "int4g64o", 3.5: "int3g64o", 3.0: "int3g0z", 2.5: "int2g64o"}
CALIBRATION, VALIDATION, HELDOUT = 192, 64, 256
PEERS = {"gptq": GPTQ(mse=False), "gptq, mse grids": GPTQ(mse=True)}
VARIANTS: dict[str, Propagation] = {
    "propagated, no correction": Propagation(correction=0.0),
    "propagated": Propagation(),
    "propagated, refined": Propagation(refinement=BlockRefinement(epochs=2)),
}
HEAL_STEPS = 24


class Contest:
    def __init__(self, arguments: argparse.Namespace):
        torch.set_num_threads(1)
        self.tokenizer, self.model = load_tokenizer(MODEL), load_encoder(MODEL, torch.float32)
        self.teacher = copy.deepcopy(self.model)
        articles = wikipedia_articles()
        split = int(0.6 * len(articles))
        known = _sentences(articles[:split], CALIBRATION + VALIDATION)
        fitted = [sentence for number, sentence in enumerate(known) if number % 4 != 3]
        self.sentences = {"validation": known[3::4], "heldout": _sentences(articles[split:], HELDOUT)}
        self.batches = [_encode(self.tokenizer, fitted[i : i + 16]) for i in range(0, len(fitted), 16)]
        self.checks = [_encode(self.tokenizer, self.sentences["validation"][:32])]
        self.references = {
            name: sentence_embeddings(self.model, self.tokenizer, texts) for name, texts in self.sentences.items()
        }
        targets = find_targets(self.model)[0]
        self.weights = sum(layer_weight(self.model.get_submodule(target.name)).numel() for target in targets)
        self.others = model_nbytes(self.model) - sum(
            4 * layer_weight(module).numel() + 4 * (0 if module.bias is None else module.bias.numel())
            for module in [self.model.get_submodule(target.name) for target in targets]
        )
        self.original = KeptModules(self.model)
        settings = {
            "model": MODEL,
            "sentences": {"calibration": CALIBRATION, "validation": VALIDATION, "held-out": HELDOUT},
            "peers": {name: vars(peer) for name, peer in PEERS.items()},
            "propagation": {name: variant.model_dump() for name, variant in VARIANTS.items()},
            "heal_steps": HEAL_STEPS,
        }
        self.rows = Rows("geometry_encoder", settings, arguments.resume)
        self.survey: Any = None
        self.variants: list[str] = arguments.variants

    def record(self, method: str, bits: float, started: float, **more: Any) -> float:
        """Write a row; one minus the cosine on validation sentences."""
        seconds = process_time() - started
        row: dict[str, Any] = {"method": method, "budget_bits_per_weight": bits}
        row["bits_per_weight"] = 8 * (model_nbytes(self.model) - self.others) / self.weights
        for name, texts in self.sentences.items():
            quality = compare_embeddings(self.references[name], sentence_embeddings(self.model, self.tokenizer, texts))
            row[f"{name}_divergence"] = 1 - quality.mean_cosine
        self.rows.drop(method=method, budget_bits_per_weight=bits)
        self.rows.add(**row, seconds=seconds, **more)
        return float(row["validation_divergence"])

    def peers(self, bits: float) -> None:
        started = process_time()
        budget = tnc.Budget(bits_per_weight=bits + 0.2)
        tnc.compress(self.model, budget, method="dense", formats=[FORMATS[bits]], allocator="uniform", workers=1)
        self.record("rtn", bits, started)
        self.original.put_back()
        for label, settings in PEERS.items():
            started = process_time()
            chosen = GPTQ(**(vars(settings) | {"fmt": FORMATS[bits]}))
            quantise_model(self.model, self.batches, chosen)
            self._round_rest(bits)
            self.record(label, bits, started)
            self.original.put_back()

    def _round_rest(self, bits: float) -> None:
        """The pooler lies outside the blocks; it does not touch the embeddings, and takes the same format."""
        budget = tnc.Budget(bits_per_weight=bits + 0.2)
        tnc.compress(
            self.model,
            budget,
            method="dense",
            formats=[FORMATS[bits]],
            allocator="uniform",
            targets=["pooler.dense"],
            workers=1,
        )

    def ours(self, bits: float) -> None:
        started = process_time()
        if self.survey is None:
            self.survey = survey_model(self.model, self.batches, method="dense", workers=1, progress=Lines())
        budget = tnc.Budget(bits_per_weight=bits)
        tnc.compress(self.model, budget, self.batches, method="auto", survey=self.survey, refine=0, workers=1)
        plan = getattr(self.model, PLAN_ATTRIBUTE)
        best = self.record("allocated", bits, started), "allocated", KeptModules(self.model)
        for label in self.variants:
            settings = VARIANTS[label]
            self.original.put_back()
            started = process_time()
            reports = propagate(self.model, plan, self.batches, settings)
            errors = [report.fitted if report.refined is None else report.refined for report in reports]
            value = self.record(label, bits, started, blocks=errors, corrections=[r.corrections for r in reports])
            best = min(best, (value, label, KeptModules(self.model)), key=lambda found: found[0])
        best[2].put_back()
        started = process_time()
        heal(self.model, self.batches, teacher=self.teacher, steps=HEAL_STEPS, validation=self.checks, every=8)
        self.record("healed", bits, started, kept=best[1])
        self.original.put_back()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bits", type=float, nargs="+", default=list(FORMATS), choices=list(FORMATS))
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS, help="kinds of propagation")
    parser.add_argument("--resume", action="store_true", help="keep the rows of the result file")
    arguments = parser.parse_args()
    contest = Contest(arguments)
    for bits in arguments.bits:
        if not contest.rows.has(method="gptq, mse grids", budget_bits_per_weight=bits):
            contest.peers(bits)
        if not contest.rows.has(method="healed", budget_bits_per_weight=bits):
            contest.ours(bits)


if __name__ == "__main__":
    main()
