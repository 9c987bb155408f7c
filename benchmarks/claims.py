"""The claims of "On Information Geometry and Iterative Optimization in Model Compression" (2507.09428): does the metric matter
before and after fine-tuning, and does softer reduction win?

On a small transformer and a small CNN (scikit-learn's digits, other noise in every epoch, and fine-tuned on noise that training
never saw: on images that a model knows by heart all training does harm), on SmolLM2-135M (cross-entropy of held-out prose) and
on MiniLM (one minus the cosine to the original's sentence embeddings). A seed draws the small models and their data, or chooses
the windows (sentences) that metrics are collected from and those that are trained on, all from the calibration articles.

``metric`` rows: every layer at the same share of its bytes (two fp32 cores), truncated in each metric, then fine-tuned.
``schedule`` rows: the same bytes under one multiplier in the Kronecker metric and the same number of batches, spent after the
truncation (one-shot) or around several softer ones before it. ``claim`` rows count the settings (model, size, seed) in which a
statement held; it holds from three quarters on, and that something makes no difference holds between one and three quarters.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
from digits import ARCHITECTURES, IGNORED, Digits, loss, trained
from experiments import ENCODER, LANGUAGE, experiment, seeded
from torch import Tensor, nn

import tensornet_compress as tnc
from tensornet_compress.bench.harness import STORED, Job
from tensornet_compress.bench.texts import TEXTS
from tensornet_compress.calibrate import collect_statistics
from tensornet_compress.coding import parse_format
from tensornet_compress.decompose import matrix_spectrum
from tensornet_compress.experimental import reduce_gradually, weighted_cores
from tensornet_compress.inputs import load_causal_lm, load_encoder, load_tokenizer
from tensornet_compress.metric import ElementwiseMetric, euclidean
from tensornet_compress.nn import find_targets, layer_weight, replace_module
from tensornet_compress.report import Measure, Row
from tensornet_compress.tensor import TensorNetwork
from tensornet_compress.train import Schedule, heal, isvt, next_token_loss
from tensornet_compress.train.reduction import rank_spec

SEEDS, KEEPS, RATE, FP32 = range(3), (0.9, 0.8, 0.6, 0.4), 2e-3, parse_format("fp32")
METRICS = ("euclidean", "row-fisher", "input", "kronecker", "elementwise")
WINDOW, POOL, COLLECTED, VALIDATION, HELDOUT = 256, 240, 16, 4, 16
BEFORE, AFTER, SOFTER = "before fine-tuning", "after fine-tuning", "at equal bytes and steps"
MEASURES = {
    "excess_before": Measure(title="excess loss before fine-tuning", better="lower", explanation="Over the dense model's."),
    "excess_after": Measure(title="excess loss after fine-tuning", better="lower", explanation="Over the dense model's."),
    "loss": Measure(title="loss of the dense model", better="lower"),
    "nbytes": STORED,
    "held": Measure(title="true in"),
    "settings": Measure(title="settings"),
}


@dataclass
class Subject:
    """A model with batches: for metrics, to train on, to choose by, and held out. ``steps``: of training in all, ``before`` of
    them before the last threshold; ``thresholds`` of the schedules: cycles, others."""

    model: nn.Module
    ignored: list[str]
    collected: list[Any]
    trained: list[Any]
    validation: list[Any]
    heldout: list[Any]
    loss: Callable[[nn.Module, Any], Tensor]
    summed: Callable[[nn.Module, Any], Tensor] | None
    steps: int
    before: int
    thresholds: tuple[int, int]
    dense_rate: float

    @property
    def names(self) -> list[str]:
        """Layers that are compressed."""
        return [target.name for target in find_targets(self.model, ignore=self.ignored)[0]]

    @torch.no_grad()
    def quality(self, model: nn.Module) -> float:
        """Mean held-out loss."""
        return sum(float(self.loss(model, batch)) for batch in self.heldout) / len(self.heldout)

    def metrics(self, kind: str) -> dict[str, Any]:
        if kind == "euclidean":
            return dict.fromkeys(self.names, euclidean())
        statistics = collect_statistics(self.model, self.collected, self.names, [kind], loss=self.summed)
        return {name: statistics[name].metric(kind) for name in self.names}

    def tune(self, model: nn.Module, batches: list[Any]) -> None:
        """Fine-tune cores, norms and biases; the best step on the validation batches is kept."""
        steps = len(batches)
        rest: dict[str, Any] = {"validation": self.validation, "every": max(1, steps // 2), "patience": 99}
        heal(model, batches, loss=self.loss, steps=steps, rate=RATE, **rest)


@lru_cache(maxsize=1)
def subject(name: str, seed: int) -> Subject:
    return {LANGUAGE: language, ENCODER: encoder}.get(name, partial(small, name))(seed)


def small(name: str, seed: int) -> Subject:
    digits = Digits.load(seed)
    batches = (digits.fresh[0] * 2)[:40]
    rest: dict[str, Any] = {"steps": 40, "before": 20, "thresholds": (5, 10), "dense_rate": 1e-4}
    summed = partial(loss, reduction="sum")  # with the data's labels, as FWSVD takes it
    held = [digits.validation, digits.heldout, loss, summed]
    return Subject(trained(name, digits, seed), IGNORED[name], digits.train, batches, *held, **rest)


def language(seed: int) -> Subject:
    tokenizer = load_tokenizer(LANGUAGE)
    windows = TEXTS["wikipedia"].windows(tokenizer, "calibration", WINDOW, POOL + VALIDATION)
    heldout = TEXTS["wikipedia"].windows(tokenizer, "heldout", WINDOW, HELDOUT)
    chosen = windows[:POOL][torch.randperm(POOL, generator=torch.Generator().manual_seed(seed))]
    parts = [list(chosen[:COLLECTED].split(4)), list(chosen[COLLECTED : COLLECTED + 16].split(1)), [windows[POOL:]]]
    return real(load_causal_lm(LANGUAGE, torch.float32), [], parts, list(heldout.split(4)), next_token_loss)


def encoder(seed: int) -> Subject:
    """Every batch is (inputs, the original's embeddings)."""
    tokenizer, model = load_tokenizer(ENCODER), load_encoder(ENCODER, torch.float32)
    sizes = [8 * COLLECTED, 16 * 16, 16 * VALIDATION]
    known = TEXTS["wikipedia"].sentences("calibration", 10**6)
    known = [known[place] for place in torch.randperm(len(known), generator=torch.Generator().manual_seed(seed)).tolist()]
    heldout = TEXTS["wikipedia"].sentences("heldout", 10**6)[: 16 * HELDOUT]

    @torch.no_grad()
    def batches(sentences: list[str]) -> list[Any]:
        parts = [sentences[i : i + 16] for i in range(0, len(sentences), 16)]
        encoded = [dict(tokenizer(p, padding=True, truncation=True, max_length=128, return_tensors="pt")) for p in parts]
        return [(inputs, embedding(model, inputs)) for inputs in encoded]

    parts = [batches(known[sum(sizes[:i]) : sum(sizes[: i + 1])]) for i in range(3)]
    parts[0] = [inputs for inputs, _ in parts[0]]
    # No sentence embedding depends on the pooler.
    return real(model, ["pooler.*"], parts, batches(heldout), lambda m, b: 1 - (embedding(m, b[0]) * b[1]).sum(-1).mean())


def real(model: nn.Module, ignored: list[str], parts: list[Any], heldout: list[Any], of: Any) -> Subject:
    return Subject(model.eval(), ignored, *parts, heldout, of, None, steps=16, before=8, thresholds=(4, 4), dense_rate=1e-5)


def embedding(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    hidden = model(**inputs).last_hidden_state.float()
    return torch.nn.functional.normalize((hidden * inputs["attention_mask"][..., None]).sum(1), dim=-1)


def dense(name: str, seed: int) -> dict[str, Any]:
    given = subject(name, seed)
    return {"values": {"loss": given.quality(given.model)}}


def truncated(name: str, seed: int, kind: str, keep: float) -> dict[str, Any]:
    """Every layer as two fp32 cores that take ``keep`` of its bytes, then fine-tuned."""
    given = subject(name, seed)
    model, metrics = copy.deepcopy(given.model), metrics_of(name, seed, kind)
    for layer, metric in metrics.items():
        weight = layer_weight(model.get_submodule(layer)).contiguous()
        matrix = weight.flatten(1)
        rank = max(1, int(keep * matrix.numel() / sum(matrix.shape)))
        elementwise = isinstance(metric, ElementwiseMetric)
        left, right = weighted_cores(matrix, metric, rank)[:2] if elementwise else matrix_spectrum(matrix, metric).cores(rank)
        cores = [left, right.reshape(rank, *weight.shape[1:])]
        replace_module(model, layer, TensorNetwork.from_cores(rank_spec(weight, rank, FP32), [cores]))
    return judged(given, model, given.trained)


def reduced(name: str, seed: int, label: str, keep: float) -> dict[str, Any]:
    """The same bytes under one multiplier, by a schedule."""
    given = subject(name, seed)
    model, budget = copy.deepcopy(given.model), tnc.Budget(bits_per_weight=32 * keep)
    options: dict[str, Any] = {"fmt": "fp32", "ignore": given.ignored, "metric": metrics_of(name, seed, "kronecker")}
    options["loss"] = given.loss
    if label == "isvt":
        # As many gradients as the others have steps before their last threshold, without those of backtracking.
        nbytes = isvt(model, given.trained[:4], budget, schedule=Schedule(steps=given.before // 4), **options).nbytes
        left = given.trained[given.before :]
    else:
        cycles, others = given.thresholds
        schedules = {"one-shot": Schedule(kind="one-shot"), "cycles": Schedule(kind="cycles", steps=cycles)}
        options |= {"schedule": schedules.get(label, Schedule(kind="cubic", steps=others)), "rate": given.dense_rate}
        before = 0 if label == "one-shot" else given.before
        options |= {"threshold": "soft" if label == "soft" else "hard", "steps": before}
        nbytes = reduce_gradually(model, given.trained, budget, **options).nbytes[-1]
        left = given.trained[before:]
    row = judged(given, model, left)
    return row | {"values": row["values"] | {"nbytes": nbytes}}


@lru_cache(maxsize=1)
def metrics_of(name: str, seed: int, kind: str) -> dict[str, Any]:
    return subject(name, seed).metrics(kind)


def judged(given: Subject, model: nn.Module, batches: list[Any]) -> dict[str, Any]:
    original, before = given.quality(given.model), given.quality(model)
    given.tune(model, batches)
    return {"values": {"excess_before": before - original, "excess_after": given.quality(model) - original}}


def jobs() -> Iterator[Job]:
    for name in (*ARCHITECTURES, ENCODER, LANGUAGE):
        for seed in SEEDS:
            where = seeded(name, seed)
            yield Job("weights", where, "dense", partial(dense, name, seed))
            works = {f"metric: {kind}": partial(truncated, name, seed, kind) for kind in METRICS}
            if name not in ARCHITECTURES:
                works.pop("metric: elementwise")
            for label in ("one-shot", "cycles", "cubic", "soft", "isvt"):
                works[f"schedule: {label}"] = partial(reduced, name, seed, label)
            for method, work in works.items():
                for keep in KEEPS:
                    yield Job("weights", where, method, partial(work, keep), keep, "kept", ours=True)


def statements() -> Iterator[tuple[str, str, str, str, bool]]:
    """(statement, the better one, the worse one, the value, whether the paper says yes or that it makes no difference)."""
    for stage, says in ((BEFORE, True), (AFTER, False)):
        for kind, rival in [(kind, "euclidean") for kind in METRICS[1:]] + [("kronecker", "input")]:
            words = f"{kind} beats {'SVD' if rival == 'euclidean' else rival} {stage}"
            yield words, f"metric: {kind}", f"metric: {rival}", f"excess_{stage.split()[0]}", says
    for label in ("isvt", "cycles", "cubic", "soft"):
        yield f"{label} beats one-shot {SOFTER}", f"schedule: {label}", "schedule: one-shot", "excess_after", True


def verdict(held: int, of: int, says: bool) -> str:
    """Three quarters of the settings or more settle a statement, a quarter or fewer its opposite."""
    often, seldom = held >= 0.75 * of, held <= 0.25 * of
    if says:
        return "holds" if often else "does not hold" if seldom else "undecided"
    return "does not hold" if often or seldom else "holds"


def summary(rows: Sequence[Row]) -> Iterator[Row]:
    """Each statement with the number of settings in which it held, on small models and on each real one."""
    losses = {(row.subject, row.method, row.budget): row.values for row in rows if row.budget is not None}
    groups = {"small models": tuple(ARCHITECTURES), ENCODER: (ENCODER,), LANGUAGE: (LANGUAGE,)}
    for group, names in groups.items():
        for words, better, worse, value, says in statements():
            settings = [(seeded(name, seed), keep) for name in names for seed in SEEDS for keep in KEEPS]
            pairs = [(losses.get((s, better, k), {}), losses.get((s, worse, k), {})) for s, k in settings]
            held = [a[value] < b[value] for a, b in pairs if value in a and value in b]
            if held:
                values = {"held": float(sum(held)), "settings": float(len(held))}
                told = {"paper": "yes" if says else "no difference"}
                note = verdict(sum(held), len(held), says)
                yield Row(task="weights", subject=f"claims, {group}", method=words, values=values, settings=told, note=note)


if __name__ == "__main__":
    settings = {"keep": list(KEEPS), "rate": RATE, "window": WINDOW, "steps": {"small": 40, "real": 16}}
    experiment(jobs(), MEASURES, settings, summary)
