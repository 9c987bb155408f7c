"""Unit truths of iterative singular value thresholding, as numbers and a trace.

python benchmarks/geometry_units.py
"""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import torch
from common import write_result
from geometry_models import IGNORED, Digits, mean_loss, summed_loss, trained

sys.path.insert(0, str(Path(__file__).parents[1]))

import tensornet_compress as tnc
from tensornet_compress.decompose import matrix_spectrum
from tensornet_compress.metric import KroneckerMetric
from tensornet_compress.train import Schedule, isvt, proximal_step
from tensornet_compress.train.proximal import Cost
from tests.generators import correlated_moment, random_tensor
from tests.train.problems import Linear, correlated_inputs, least_squares, logistic


def main() -> None:
    torch.set_num_threads(1)
    write_result(
        "geometry_units",
        {
            "one_step_from_a_stationary_point": closed_form_gaps(),
            "least_squares": trace(*least_squares_problem(), loss=least_squares, metric="input"),
            "logistic_regression": trace(*logistic_problem(), loss=logistic, metric="input"),
            "transformer": transformer_trace(),
            "step_of_2.5_over_L": too_large(),
        },
    )


def closed_form_gaps() -> dict[str, float]:
    """Largest difference between a unit step from a stationary point and the closed-form truncation, float64."""
    weight = random_tensor((40, 56))
    rows, columns = correlated_moment(40, 1), correlated_moment(56, 2)
    costs = {"w": Cost(unit=96, dense=10**9)}
    gaps = {}
    for label, metric in (("SVD-LLM", KroneckerMetric(columns=columns)), ("KFAC-SVD", KroneckerMetric(rows, columns))):
        still = {"w": torch.zeros_like(weight)}
        _, result = proximal_step({"w": weight}, still, {"w": metric}, costs, 12 * 96, 1.0)
        left, right = matrix_spectrum(weight, metric).cores(12)
        gaps[label] = float((result["w"] - left @ right).abs().max() / weight.abs().max())
    return gaps


def least_squares_problem() -> tuple[Any, Any]:
    model, x = Linear(20, 28), correlated_inputs(800, 28)
    return model, [(x, model(x).detach() + correlated_inputs(800, 20, 9))]


def logistic_problem() -> tuple[Any, Any]:
    x = correlated_inputs(600, 28)
    return Linear(10, 28), [(x, (x @ random_tensor((28, 10), 4)).argmax(1))]


def trace(model: Any, data: Any, loss: Any, metric: Any, **options: Any) -> dict[str, Any]:
    report = isvt(
        model,
        data,
        tnc.Budget(bits_per_weight=16.0),
        metric=metric,
        loss=loss,
        metric_loss=lambda m, b: loss(m, b) * len(b[0]),
        schedule=Schedule(steps=options.pop("steps", 40)),
        fmt="fp32",
        **options,
    )
    return {
        "monotone": not any(step.rose for step in report.steps),
        "settled_steps": report.settled,
        "too_large": report.too_large,
        "advice": report.advice,
        "best": report.best,
        "ranks": report.ranks,
        "trace": [{"loss": s.loss, "before": s.before, "objective": s.objective, "step": s.step} for s in report.steps],
    }


def transformer_trace() -> dict[str, Any]:
    digits = Digits.load(0)
    model = trained("transformer", digits, 0, epochs=6)
    options = {"ignore": IGNORED["transformer"], "steps": 10}
    report = isvt(
        model,
        digits.train[:6],
        tnc.Budget(bits_per_weight=12.0),
        metric="kronecker",
        loss=mean_loss,
        metric_loss=summed_loss,
        schedule=Schedule(steps=options["steps"]),
        fmt="fp32",
        ignore=IGNORED["transformer"],
    )
    return {
        "monotone": not any(step.rose for step in report.steps),
        "settled_steps": report.settled,
        "initial": report.initial,
        "best": report.best,
        "trace": [
            {"loss": s.loss, "before": s.before, "objective": s.objective, "step": s.step, "nbytes": s.nbytes}
            for s in report.steps
        ],
    }


def too_large() -> dict[str, Any]:
    model, data = least_squares_problem()
    x = data[0][0]
    largest = float(torch.linalg.eigvalsh(x.T @ x / len(x))[-1])
    common: dict[str, Any] = {"loss": least_squares, "metric": {"map": KroneckerMetric()}, "backtrack": False, "steps": 60}
    beyond = trace(copy.deepcopy(model), data, step=2.5 / largest, **common)
    within = trace(copy.deepcopy(model), data, step=0.9 / largest, **common)
    return {"L": largest, "2.5/L": beyond, "0.9/L": {name: within[name] for name in ("monotone", "too_large", "best")}}


if __name__ == "__main__":
    main()
