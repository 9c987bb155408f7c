"""The paper's claims on real models: SmolLM2-135M on held-out prose and all-MiniLM-L6-v2 on held-out sentences.

    python benchmarks/geometry_claims_real.py [--subjects smollm2-135m all-minilm-l6-v2] [--seeds 0 1 2]
        [--parts metric schedule] [--keep 0.9 0.8 0.6 0.4] [--labels one-shot isvt ...] [--precision bf16] [--resume]

As ``geometry_claims.py``, with fewer steps. A seed chooses the windows (sentences) that metrics are collected from and those
that are trained on, all of them from the calibration articles; held-out ones are the same for all seeds. ``loss`` is the
cross-entropy of the next token, or for the encoder one minus the cosine to the original's sentence embedding, in training and
when held out. ``part metric``: every layer at the same keep, before and after the same fine-tuning of the cores. ``part
schedule``: the same bytes in the Kronecker metric and the same number of batches, before or after the last truncation.
``precision``: of the language model's losses, in training and when held out; a row is compared with the dense model's in the
same precision. Processors without instructions for bf16 take many times longer with it than with fp32.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from dataclasses import dataclass
from time import process_time
from typing import Any

import torch
import torch.nn.functional as F
from common import LENGTH, RESULTS
from geometry_claims import FP32, SCHEDULES, claims, row, summary
from geometry_common import Rows
from torch import Tensor, nn

import tensornet_compress as tnc
from tensornet_compress.calibrate import collect_statistics
from tensornet_compress.decompose import MatrixSpectrum, matrix_spectrum
from tensornet_compress.experimental import reduce_gradually
from tensornet_compress.inputs import (
    calibration_windows,
    heldout_windows,
    load_causal_lm,
    load_encoder,
    load_tokenizer,
    wikipedia_articles,
)
from tensornet_compress.metric import euclidean
from tensornet_compress.nn import find_targets, layer_weight, replace_module
from tensornet_compress.tensor import TensorNetwork
from tensornet_compress.train import Problem, Schedule, curvature, heal, isvt, next_token_loss
from tensornet_compress.train.reduction import rank_spec

KEEPS = (0.9, 0.8, 0.6, 0.4)
KINDS = ("euclidean", "row-fisher", "input", "kronecker")
LANGUAGE, ENCODER = "smollm2-135m", "all-minilm-l6-v2"
STEPS, BEFORE = 16, 8
RATE, DENSE_RATE = 2e-3, 1e-5
STATISTICS, VALIDATION, HELDOUT = 16, 4, 16
WINDOW = LENGTH // 2
POOL = 240
IGNORED = {LANGUAGE: [], ENCODER: ["pooler.*"]}  # No sentence embedding depends on the pooler.
# As in geometry_claims.py, with a threshold for every other step.
GRADUAL = {
    label: Schedule(kind=schedule.kind, steps=BEFORE // 2) for label, (schedule, _, before) in SCHEDULES.items() if before
}
SHORTER: dict[str, tuple[Schedule, str, int]] = {
    label: (GRADUAL.get(label, schedule), threshold, BEFORE if before else 0)
    for label, (schedule, threshold, before) in SCHEDULES.items()
}

LABELS = [*KINDS, *SHORTER, "isvt"]


@dataclass
class Subject:
    """``collected``: batches for metrics; ``trained``: one batch a step; ``heldout``, ``validation``: batches for ``loss``."""

    name: str
    model: nn.Module
    collected: list[Any]
    trained: list[Any]
    validation: list[Any]
    heldout: list[Any]
    loss: Callable[[nn.Module, Any], Tensor]
    precision: str

    @property
    def names(self) -> list[str]:
        """Layers that are compressed."""
        return [target.name for target in find_targets(self.model, ignore=IGNORED[self.name])[0]]

    def quality(self, model: nn.Module) -> dict[str, float]:
        """Mean held-out loss."""
        with torch.no_grad():
            return {"loss": sum(float(self.loss(model, batch)) for batch in self.heldout) / len(self.heldout)}


def language(seed: int, precision: str) -> Subject:
    tokenizer = load_tokenizer(LANGUAGE)
    windows = calibration_windows(tokenizer, WINDOW, POOL + VALIDATION)
    order = torch.randperm(POOL, generator=torch.Generator().manual_seed(seed))
    chosen = windows[:POOL][order]
    return Subject(
        LANGUAGE,
        load_causal_lm(LANGUAGE, torch.float32).eval(),
        list(chosen[:STATISTICS].split(4)),
        list(chosen[STATISTICS : STATISTICS + STEPS].split(1)),
        [windows[POOL:]],
        list(heldout_windows(tokenizer, WINDOW, HELDOUT).split(4)),
        _in_halves if precision == "bf16" else next_token_loss,
        precision,
    )


def _in_halves(model: nn.Module, batch: Any) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return next_token_loss(model, batch)


def encoder(seed: int, _: str) -> Subject:
    """Every batch is (inputs, the original's embeddings); always in fp32."""
    tokenizer, model = load_tokenizer(ENCODER), load_encoder(ENCODER, torch.float32).eval()
    articles = wikipedia_articles()
    split = int(0.6 * len(articles))
    known, heldout = _sentences(articles[:split]), _sentences(articles[split:])
    order = torch.randperm(len(known), generator=torch.Generator().manual_seed(seed)).tolist()
    known = [known[place] for place in order]

    def batches(sentences: list[str]) -> list[Any]:
        encoded = [
            dict(tokenizer(sentences[i : i + 16], padding=True, truncation=True, max_length=128, return_tensors="pt"))
            for i in range(0, len(sentences), 16)
        ]
        with torch.no_grad():
            return [(inputs, _embedding(model, inputs)) for inputs in encoded]

    sizes = [8 * STATISTICS, 16 * STEPS, 16 * VALIDATION]
    parts = [known[sum(sizes[:i]) : sum(sizes[: i + 1])] for i in range(3)]
    collected, trained, validation = (batches(part) for part in parts)
    inputs = [batch for batch, _ in collected]
    return Subject(ENCODER, model, inputs, trained, validation, batches(heldout[: 16 * HELDOUT]), _away_from_original, "fp32")


def _sentences(articles: tuple[str, ...]) -> list[str]:
    return [line[:400] for article in articles for line in article.split("\n") if len(line) > 100]


def _embedding(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    mask = inputs["attention_mask"][..., None].float()
    hidden = model(**inputs).last_hidden_state.float()
    return F.normalize((hidden * mask).sum(1), dim=-1)


def _away_from_original(model: nn.Module, batch: Any) -> Tensor:
    return 1 - (_embedding(model, batch[0]) * batch[1]).sum(-1).mean()


SUBJECTS = {ENCODER: encoder, LANGUAGE: language}


def cut(subject: Subject, spectra: dict[str, MatrixSpectrum], keep: float) -> nn.Module:
    """A copy of the model with every layer as two fp32 cores that take ``keep`` of its bytes."""
    made = copy.deepcopy(subject.model)
    for name in subject.names:
        weight = layer_weight(made.get_submodule(name)).contiguous()
        rank = max(1, int(keep * weight.numel() / sum(weight.shape)))
        left, right = spectra[name].cores(rank)
        replace_module(made, name, TensorNetwork.from_cores(rank_spec(weight, rank, FP32), [[left, right]]))
    return made


def tune(subject: Subject, model: nn.Module, batches: list[Any]) -> Any:
    """Fine-tune cores, norms and biases; the best step on the validation batches is kept."""
    return heal(
        model,
        batches,
        loss=subject.loss,
        steps=len(batches),
        rate=RATE,
        validation=subject.validation,
        every=max(1, len(batches) // 2),
        patience=99,
    )


def metric_rows(subject: Subject, seed: int, keeps: list[float], labels: list[str], rows: Rows) -> None:
    common = {"architecture": subject.name, "seed": seed}
    kinds = [kind for kind in KINDS if kind in labels]
    waiting = [k for k in kinds if not all(rows.has(**common, part="metric", label=k, keep=keep) for keep in keeps)]
    if not waiting:
        return
    needed = [kind for kind in waiting if kind != "euclidean"]
    statistics = collect_statistics(subject.model, subject.collected, subject.names, needed) if needed else {}
    for kind in waiting:
        spectra = {}
        for name in subject.names:
            weight = layer_weight(subject.model.get_submodule(name)).contiguous()
            spectra[name] = matrix_spectrum(weight, euclidean() if kind == "euclidean" else statistics[name].metric(kind))
        for keep in keeps:
            if rows.has(**common, part="metric", label=kind, keep=keep):
                continue
            started = process_time()
            model = cut(subject, spectra, keep)
            before = subject.quality(model)
            report = tune(subject, model, subject.trained)
            made = row("metric", kind, keep, before, subject.quality(model))
            seconds = process_time() - started
            rows.add(**common, **made, precision=subject.precision, kept_step=report.best_step, seconds=seconds)


def schedule_rows(subject: Subject, seed: int, keeps: list[float], labels: list[str], rows: Rows) -> None:
    """All contenders end at the same byte budget and train on the same number of batches."""
    common = {"architecture": subject.name, "seed": seed}
    wanted = [(k, label) for k in keeps for label in [*SHORTER, "isvt"] if label in labels]
    waiting = [(k, label) for k, label in wanted if not rows.has(**common, part="schedule", label=label, keep=k)]
    if not waiting:
        return
    statistics = collect_statistics(subject.model, subject.collected, subject.names, ["kronecker"])
    metrics = {name: statistics[name].metric("kronecker") for name in subject.names}
    del statistics
    options: dict[str, Any] = {"fmt": "fp32", "ignore": IGNORED[subject.name], "metric": metrics, "loss": subject.loss}
    largest, shared = 0.0, 0.0
    for keep, label in waiting:
        started = process_time()
        budget = tnc.Budget(bits_per_weight=32 * keep)
        other = copy.deepcopy(subject.model)
        if label == "isvt":
            # As many gradients as the others have steps before their last threshold.
            part, steps = subject.trained[: BEFORE // 2], 2
            if not largest:
                # The step 1/L that ``isvt`` would find by itself is the same at every size.
                largest = curvature(Problem(other, subject.names, part, subject.loss), metrics)
                started, shared = process_time(), process_time() - started
            settings = {"schedule": Schedule(steps=steps), "backtrack": True, "step": 1 / max(largest, 1e-30)}
            nbytes = isvt(other, part, budget, **settings, **options).nbytes
            trained_before = BEFORE
        else:
            schedule, threshold, trained_before = SHORTER[label]
            options_here = options | {"schedule": schedule, "threshold": threshold, "rate": DENSE_RATE}
            nbytes = reduce_gradually(other, subject.trained, budget, steps=trained_before, **options_here).nbytes[-1]
        before = subject.quality(other)
        tune(subject, other, subject.trained[trained_before:])
        made = row("schedule", label, keep, before, subject.quality(other))
        seconds = process_time() - started + (shared if label == "isvt" else 0.0)
        rows.add(**common, **made, precision=subject.precision, nbytes=nbytes, seconds=seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--subjects", nargs="+", default=list(SUBJECTS), choices=SUBJECTS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--parts", nargs="+", default=["metric", "schedule"], choices=["metric", "schedule"])
    parser.add_argument("--keep", type=float, nargs="+", default=list(KEEPS))
    parser.add_argument("--labels", nargs="+", default=LABELS, choices=LABELS, help="metrics and schedules")
    parser.add_argument("--precision", default="bf16", choices=("bf16", "fp32"))
    parser.add_argument("--resume", action="store_true", help="keep the rows of the result file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    settings = {
        "fine_tuning_steps": STEPS,
        "before_the_last_threshold": BEFORE,
        "rate": RATE,
        "dense_rate": DENSE_RATE,
        "window": WINDOW,
        "sentences_per_batch": 16,
        "batches": {"statistics": STATISTICS // 4, "validation": VALIDATION, "held-out": HELDOUT},
        "keep": KEEPS,
    }
    rows = Rows("geometry_claims_real", settings, arguments.resume)
    for seed in arguments.seeds:
        for name in arguments.subjects:
            subject = SUBJECTS[name](seed, arguments.precision)
            dense = {"architecture": name, "seed": seed, "part": "dense", "precision": subject.precision}
            if not rows.has(**dense):
                rows.add(**dense, **subject.quality(subject.model))
            if "metric" in arguments.parts:
                metric_rows(subject, seed, arguments.keep, arguments.labels, rows)
            if "schedule" in arguments.parts:
                schedule_rows(subject, seed, arguments.keep, arguments.labels, rows)
    print(len(summary(rows.rows)), "settings;", RESULTS)
    for claim, verdict in claims(rows.rows).items():
        print(claim, verdict)


if __name__ == "__main__":
    main()
