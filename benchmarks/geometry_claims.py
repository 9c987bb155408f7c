"""The paper's claims on small models: does the metric matter before and after fine-tuning, and does softer reduction win?

    python benchmarks/geometry_claims.py [--seeds 0 1 2] [--resume]

A small transformer and a small CNN are trained on scikit-learn's digits with other noise in every epoch, and fine-tuned on
noise that training never saw: on images that a model knows by heart all training does harm. Keep is the share of the weights'
bytes that two-core networks (fp32) take.

* ``metric`` rows: every layer at the same keep, truncated in each metric, and again after the same fine-tuning of the cores.
* ``schedule`` rows: the same bytes under one multiplier in the Kronecker metric, and the same number of training steps, spent
  after the truncation (one-shot) or around several softer ones before it.
"""

from __future__ import annotations

import argparse
import copy
import json
from dataclasses import replace
from time import process_time
from typing import Any

import torch
from common import RESULTS, machine, write_result
from geometry_models import ARCHITECTURES, IGNORED, Digits, mean_loss, quality, summed_loss, trained
from torch import nn

import tensornet_compress as tnc
from tensornet_compress.calibrate import collect_statistics
from tensornet_compress.coding import parse_format
from tensornet_compress.decompose import matrix_spectrum
from tensornet_compress.experimental import reduce_gradually, weighted_cores
from tensornet_compress.metric import ElementwiseMetric
from tensornet_compress.nn import find_targets, layer_weight, replace_module
from tensornet_compress.tensor import TensorNetwork
from tensornet_compress.train import Schedule, heal, isvt
from tensornet_compress.train.reduction import rank_spec

KEEPS = (0.9, 0.8, 0.6, 0.4)
STEPS = 40
CONTENDERS = ("euclidean", "row-fisher", "input", "kronecker", "elementwise")
RATE, DENSE_RATE = 2e-3, 1e-4
COPIES, EPOCHS = 15, 30
FP32 = parse_format("fp32")
SCHEDULES: dict[str, tuple[Schedule, str, int]] = {
    # label: schedule, threshold, steps before the last threshold (the rest fine-tunes the cores)
    "one-shot": (Schedule(kind="one-shot"), "hard", 0),
    "cycles": (Schedule(kind="cycles", steps=5), "hard", 20),
    "cubic": (Schedule(kind="cubic", steps=10), "hard", 20),
    "soft": (Schedule(kind="cubic", steps=10), "soft", 20),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--resume", action="store_true", help="keep the models of the result file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    stored = RESULTS / "geometry_claims.json"
    rows: list[dict[str, Any]] = json.loads(stored.read_text())["rows"] if arguments.resume else []
    for seed in arguments.seeds:
        for architecture in ARCHITECTURES:
            if any(row["architecture"] == architecture and row["seed"] == seed for row in rows):
                continue
            digits = Digits.load(seed, copies=COPIES)
            model = trained(architecture, replace(digits, fresh=digits.fresh[1:]), seed, EPOCHS)
            common = {"architecture": architecture, "seed": seed}
            rows.append(common | {"part": "dense"} | quality(model, digits.heldout))
            print(rows[-1], flush=True)
            rows += [common | row for row in metric_rows(model, architecture, digits)]
            rows += [common | row for row in schedule_rows(model, architecture, digits)]
            print(f"{process_time():.0f} processor seconds", flush=True)
            content = {"settings": settings(), "rows": rows, "summary": summary(rows), "claims": claims(rows)}
            write_result("geometry_claims", content)
    for claim, verdict in claims(rows).items():
        print(claim, verdict)


def settings() -> dict[str, Any]:
    rates = {"rate": RATE, "dense_rate": DENSE_RATE}
    return {
        "keep": KEEPS,
        "fine_tuning_steps": STEPS,
        **rates,
        "epochs": EPOCHS,
        "batch": 32,
        "torch": machine()["packages"]["torch"],
    }


def metric_rows(model: nn.Module, architecture: str, digits: Digits) -> list[dict[str, Any]]:
    names = [target.name for target in find_targets(model, ignore=IGNORED[architecture])[0]]
    kinds = [kind for kind in CONTENDERS if kind != "euclidean"]
    statistics = collect_statistics(model, digits.train, names, kinds, loss=summed_loss)
    rows = []
    for keep in KEEPS:
        for kind in CONTENDERS:
            truncated = copy.deepcopy(model)
            for name in names:
                truncate(truncated, name, statistics[name].metric(kind), keep)
            before = quality(truncated, digits.heldout)
            report = tune(truncated, digits, STEPS)
            after = quality(truncated, digits.heldout)
            rows.append(row("metric", kind, keep, before, after) | {"kept_step": report.best_step})
    return rows


def row(part: str, label: str, keep: float, before: dict[str, float], after: dict[str, float]) -> dict[str, Any]:
    merged = {f"{name}_before": value for name, value in before.items()} | {f"{name}_after": v for name, v in after.items()}
    return {"part": part, "label": label, "keep": keep} | merged


def truncate(model: nn.Module, name: str, metric: Any, keep: float) -> None:
    """Replace a layer by two fp32 cores that take ``keep`` of its bytes."""
    weight = layer_weight(model.get_submodule(name)).contiguous()
    matrix = weight.reshape(weight.shape[0], -1)
    rank = max(1, int(keep * matrix.numel() / sum(matrix.shape)))
    if isinstance(metric, ElementwiseMetric):
        left, right, _ = weighted_cores(matrix, metric, rank)
    else:
        left, right = matrix_spectrum(matrix, metric).cores(rank)
    spec = rank_spec(weight, rank, FP32)
    replace_module(model, name, TensorNetwork.from_cores(spec, [[left, right.reshape(rank, *weight.shape[1:])]]))


def tune(model: nn.Module, digits: Digits, steps: int) -> Any:
    return heal(
        model, digits.fresh[0], loss=mean_loss, steps=steps, rate=RATE, validation=digits.validation, every=20, patience=99
    )


def schedule_rows(model: nn.Module, architecture: str, digits: Digits) -> list[dict[str, Any]]:
    """All contenders end at the same byte budget and train on the same number of batches."""
    rows = []
    ignored = IGNORED[architecture]
    names = [target.name for target in find_targets(model, ignore=ignored)[0]]
    statistics = collect_statistics(model, digits.train, names, ["kronecker"], loss=summed_loss)
    metrics = {name: statistics[name].metric("kronecker") for name in names}
    common: dict[str, Any] = {"ignore": ignored, "fmt": "fp32", "metric": metrics}
    for keep in KEEPS:
        budget = tnc.Budget(bits_per_weight=32 * keep)
        for label, (schedule, threshold, before_steps) in SCHEDULES.items():
            other = copy.deepcopy(model)
            report = reduce_gradually(
                other,
                digits.fresh[0],
                budget,
                loss=mean_loss,
                schedule=schedule,
                steps=before_steps,
                rate=DENSE_RATE,
                threshold=threshold,
                **common,
            )
            before = quality(other, digits.heldout)
            tune(other, digits, STEPS - before_steps)
            rows.append(row("schedule", label, keep, before, quality(other, digits.heldout)) | {"nbytes": report.nbytes[-1]})
        other = copy.deepcopy(model)
        # Five iterations over four batches each: as many gradients as 20 minibatch steps, without those of backtracking.
        part = digits.fresh[0][:4]
        iteration = isvt(other, part, budget, loss=mean_loss, schedule=Schedule(steps=5), backtrack=True, **common)
        before = quality(other, digits.heldout)
        tune(other, digits, STEPS - 20)
        rows.append(row("schedule", "isvt", keep, before, quality(other, digits.heldout)) | {"nbytes": iteration.nbytes})
    return rows


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means over seeds of the excess loss over the dense model's."""
    dense = {(r["architecture"], r["seed"], r.get("precision")): r["loss"] for r in rows if r["part"] == "dense"}
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for r in rows:
        if r["part"] != "dense":
            groups.setdefault((r["architecture"], r["part"], r["label"], r["keep"]), []).append(r)
    table = []
    for (architecture, part, label, keep), members in groups.items():
        entry: dict[str, Any] = {"architecture": architecture, "part": part, "label": label, "keep": keep}
        for stage in ("before", "after"):
            excess = torch.tensor([m[f"loss_{stage}"] - dense[architecture, m["seed"], m.get("precision")] for m in members])
            entry[f"excess_{stage}"] = float(excess.mean())
            entry[f"spread_{stage}"] = float(excess.std()) if len(excess) > 1 else 0.0
            if all(f"accuracy_{stage}" in m for m in members):
                entry[f"accuracy_{stage}"] = float(torch.tensor([m[f"accuracy_{stage}"] for m in members]).mean())
        table.append(entry)
    return table


def claims(rows: list[dict[str, Any]]) -> dict[str, str]:
    """Each claim with the number of settings (architecture, keep, seed) in which it held, judged on held-out loss. Settings
    that were not measured are not counted."""
    found = {(r["architecture"], r["seed"], r["keep"], r["part"], r["label"]): r for r in rows if r["part"] != "dense"}
    cases = sorted({key[:3] for key in found})

    def wins(part: str, better: str, worse: str, stage: str) -> str:
        measured = [c for c in cases if (*c, part, better) in found and (*c, part, worse) in found]
        pairs = [(found[(*c, part, better)], found[(*c, part, worse)]) for c in measured]
        held = sum(a[f"loss_{stage}"] < b[f"loss_{stage}"] for a, b in pairs)
        return f"{held} of {len(pairs)}"

    verdicts = {}
    for kind in ("row-fisher", "input", "kronecker", "elementwise"):
        for stage in ("before", "after"):
            verdicts[f"{kind} beats SVD {stage} fine-tuning"] = wins("metric", kind, "euclidean", stage)
    verdicts["kronecker beats input before fine-tuning"] = wins("metric", "kronecker", "input", "before")
    verdicts["kronecker beats input after fine-tuning"] = wins("metric", "kronecker", "input", "after")
    for stage in ("before", "after"):
        ratios = [
            found[(*c, "metric", "kronecker")][f"loss_{stage}"] / found[(*c, "metric", "euclidean")][f"loss_{stage}"]
            for c in cases
            if (*c, "metric", "kronecker") in found and (*c, "metric", "euclidean") in found
        ]
        verdicts[f"median loss of kronecker / SVD {stage} fine-tuning"] = f"{float(torch.tensor(ratios).median()):.3f}"
    for label in [*SCHEDULES, "isvt"]:
        if label != "one-shot":
            verdicts[f"{label} beats one-shot at equal bytes and steps"] = wins("schedule", label, "one-shot", "after")
    return verdicts


if __name__ == "__main__":
    main()
