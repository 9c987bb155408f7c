"""One proximal step in a metric, and the curvature that bounds its size."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from tensornet_compress.decompose import matrix_spectrum
from tensornet_compress.metric import KroneckerMetric
from tensornet_compress.train.problem import Problem
from tensornet_compress.train.threshold import Choice, Cost, Threshold, apply_threshold, choose_ranks, meet_budget

Matrices = Mapping[str, Tensor]


def proximal_step(
    weights: Matrices,
    gradients: Matrices | None,
    metrics: Mapping[str, KroneckerMetric],
    costs: Mapping[str, Cost],
    allowed: int,
    step: float,
    threshold: Threshold = "hard",
    price_share: float = 1.0,
) -> tuple[Choice, dict[str, Tensor]]:
    """A gradient step in the metric and a threshold with the multiplier that meets ``allowed`` bytes (times ``price_share``).

    From a stationary point with ``step`` 1 it is the closed-form truncation in the metric: KFAC-SVD, or SVD-LLM when only
    inputs are weighted; ``gradients`` None stands for gradients that are zero.
    """
    moved = weights if gradients is None else gradient_step(weights, gradients, metrics, step)
    spectra = {name: matrix_spectrum(matrix, metrics[name]) for name, matrix in moved.items()}
    choice = meet_budget(spectra, costs, allowed, step, threshold)
    if price_share < 1:
        choice = choose_ranks(spectra, costs, price_share * choice.multiplier, step, threshold, choice.factored)
    return choice, apply_threshold(spectra, costs, choice, step, threshold)


def gradient_step(
    weights: Matrices, gradients: Matrices, metrics: Mapping[str, KroneckerMetric], step: float
) -> dict[str, Tensor]:
    """``W - a M^-1 G`` for each matrix (m, n)."""
    return {
        name: (weight.double() - step * metrics[name].precondition(gradients[name].double())).to(weight.dtype)
        for name, weight in weights.items()
    }


def model_change(
    weights: Matrices, proposal: Matrices, gradients: Matrices, metrics: Mapping[str, KroneckerMetric], step: float
) -> float:
    """``<G, D> + |D|_M^2 / (2 a)`` of a change D: what the loss changes by at most when a < 1/L."""
    total = 0.0
    for name, weight in weights.items():
        change = proposal[name].double() - weight.double()
        total += float((gradients[name].double() * change).sum()) + metrics[name].norm2(change) / (2 * step)
    return total


def curvature(problem: Problem, metrics: Mapping[str, KroneckerMetric], iterations: int = 8, seed: int = 0) -> float:
    """The largest curvature L (in size) of the loss in the metric: power iteration on ``M^-1 H``, by gradient differences."""
    weights = problem.weights()
    generator = torch.Generator().manual_seed(seed)
    direction = {
        name: torch.randn(weight.shape, generator=generator, dtype=torch.float64).to(weight) for name, weight in weights.items()
    }
    base = problem.gradients()[1]
    size = sum(metrics[name].norm2(weight) for name, weight in weights.items()) ** 0.5
    length = sum(metrics[name].norm2(d) for name, d in direction.items()) ** 0.5
    largest = 0.0
    try:
        for _ in range(iterations):
            # At unit length powers of the curvature cannot overflow.
            direction = {name: d / max(length, 1e-300) for name, d in direction.items()}
            reach = 1e-3 * size
            problem.assign({name: weight + reach * direction[name] for name, weight in weights.items()})
            moved = problem.gradients()[1]
            change = {name: (moved[name] - base[name]) / reach for name in weights}
            # A loss may curve downwards; what bounds a step is the size of the curvature.
            largest = abs(sum(float((change[name].double() * d.double()).sum()) for name, d in direction.items()))
            direction = {name: metrics[name].precondition(change[name].double()).to(weights[name]) for name in weights}
            # Of ``d = M^-1 c`` the squared length ``d' M d`` is ``d' c``.
            length = max(0.0, sum(float((change[name].double() * d.double()).sum()) for name, d in direction.items())) ** 0.5
            if not length > 0:
                break
    finally:
        problem.assign(weights)
    return largest
