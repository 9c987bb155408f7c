"""Iterative singular value thresholding (2507.09428): a Bregman-proximal iteration that lowers ranks while it lowers the loss.

One step at weights W with gradient G, in a metric M (Kronecker) with step a::

    Y  = W - a M^-1 G
    W+ = argmin 1/(2 a) |V - Y|_M^2 + lambda * bytes(V)

where the second line is a threshold on the singular values of Y in the metric, with one multiplier lambda for all layers that
meets the byte budget. With a < 1/L (L: the largest curvature of the loss in the metric) the objective ``loss + lambda * bytes``
never rises.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import log2
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tensornet_compress.calibrate.collect import Loss
from tensornet_compress.compressing import Budget
from tensornet_compress.decompose import matrix_spectrum
from tensornet_compress.errors import TensorNetError
from tensornet_compress.frozen import Frozen
from tensornet_compress.metric import KroneckerMetric
from tensornet_compress.progress import Progress, SilentProgress
from tensornet_compress.threads import limited_threads
from tensornet_compress.train.problem import MeanLoss, curvature
from tensornet_compress.train.proximal import Threshold, gradient_step, model_change
from tensornet_compress.train.reduction import Reduction, Schedule
from tensornet_compress.train.state import IsvtState, IsvtStep, content_hash

_SLACK = 1e-6
_BACKTRACKS = 30


class IsvtReport(Frozen):
    """What an iteration did: its steps, the loss of the dense model, the loss and bytes of the iterate that was kept, and
    ranks (None: dense). ``settled``: steps at the end during which no rank changed. ``too_large``: the objective rose, so
    that the step is beyond what the loss's curvature allows; ``advice`` says what to do."""

    initial: float
    best: float
    best_step: int
    nbytes: int
    allowed: int
    ranks: dict[str, int | None]
    steps: tuple[IsvtStep, ...]
    settled: int
    too_large: bool
    advice: str = ""


def isvt(
    model: nn.Module,
    batches: Sequence[Any],
    budget: Budget,
    *,
    metric: str | Mapping[str, KroneckerMetric] = "kronecker",
    step: float | None = None,
    schedule: Schedule | None = None,
    threshold: Threshold = "hard",
    loss: MeanLoss | None = None,
    metric_loss: Loss | None = None,
    fmt: str = "bf16",
    targets: Sequence[str] | None = None,
    ignore: Sequence[str] = (),
    backtrack: bool = True,
    precision: torch.dtype | None = None,
    state: str | Path | None = None,
    progress: Progress | None = None,
) -> IsvtReport:
    """Lower the ranks of the targeted layers to ``budget`` while lowering the loss; layers become two-core networks in place.

    Args:
        model: dense; targets as for ``compress``.
        batches: each step takes the gradient over all of them. ids or dicts, or anything that ``loss`` takes.
        budget: bytes of the targeted layers, see ``Budget``.
        metric: ``euclidean``, ``diagonal``, ``input``, ``row-fisher`` or ``kronecker``, collected from ``batches`` (gradient
            metrics through ``metric_loss``, see ``collect_statistics``), or a metric per layer.
        step: the step a; None takes 1/L with L measured by power iteration (see ``curvature``).
        schedule: bytes per step; ten truncate - correct cycles by default.
        threshold: ``hard`` (rank) or ``soft`` (nuclear norm).
        loss: ``loss(model, batch)``, a mean; by default the divergence from the model as it is given.
        fmt: number format of the cores, floating point.
        backtrack: halve the step until the loss lies under its quadratic bound. Without it a rising objective ends the
            iteration and is reported.
        state: a safetensors file in which every step is kept; if it exists, the iteration goes on from there. It only fits
            the same weights, batches, metric and settings.

    The iterate with the least loss among those that meet the budget is kept, and can be saved with ``tnc.save``.

    >>> import torch, tensornet_compress as tnc
    >>> x = torch.randn(64, 12)
    >>> data = [(x, x @ torch.randn(12, 8))]
    >>> loss = lambda model, batch: (model(batch[0]) - batch[1]).square().mean()
    >>> model = torch.nn.Sequential(torch.nn.Linear(12, 8))
    >>> report = tnc.train.isvt(model, data, tnc.Budget(bits_per_weight=16), metric="euclidean", loss=loss, fmt="fp32")
    >>> report.nbytes <= report.allowed
    True

    Raises:
        BudgetError: the budget cannot be met.
        TensorNetError: any other bad input.
    """
    schedule = schedule or Schedule()
    if threshold not in ("hard", "soft"):
        raise TensorNetError(f"unknown threshold {threshold!r}; choose hard or soft")
    if step is not None and not step > 0:
        raise TensorNetError(f"step must be positive, was given {step}")
    reduction = Reduction.of(
        model,
        batches,
        budget,
        metric=metric,
        metric_loss=metric_loss,
        loss=loss,
        fmt=fmt,
        targets=targets,
        ignore=ignore,
        precision=precision,
    )
    problem, metrics = reduction.problem, reduction.metrics
    dense = problem.weights()
    iteration = _Iteration(reduction, schedule, threshold, backtrack)
    file = None if state is None else Path(state)
    settings: dict[str, Any] = {}
    current = IsvtState(dense)
    if file is not None:
        settings = {"allowed": reduction.allowed, "threshold": threshold, "schedule": schedule.model_dump(), "step": step}
        settings |= {"names": list(dense), "fmt": fmt, "backtrack": backtrack, "precision": str(precision)}
        factors = {name: (given.rows, given.columns) for name, given in metrics.items()}
        settings |= {"metric": metric if isinstance(metric, str) else content_hash(factors), "dense": content_hash(dense)}
        settings |= {"batches": content_hash(list(batches)), "loss": getattr(loss, "__qualname__", str(type(loss)))}
        current = IsvtState.load(file, settings, dense)
    if not current.steps:
        with limited_threads():
            current.size = step if step is not None else 1 / max(curvature(problem, metrics), 1e-30)
    initial = problem.value()
    try:
        with (progress or SilentProgress()).stage("isvt", schedule.count) as advance:
            while len(current.steps) < schedule.count and not iteration.too_large(current):
                iteration.advance(current)
                if file is not None:
                    current.save(file, settings)
                advance()
    finally:
        problem.assign(dense)
    if not current.best_ranks:
        raise TensorNetError("no iterate met the budget with a finite loss; give a smaller step, or let it backtrack")
    reduction.install(current.best_weights, current.best_ranks)
    return _report(current, initial, reduction, iteration.too_large(current))


@dataclass
class _Iteration:
    reduction: Reduction
    schedule: Schedule
    threshold: Threshold
    backtrack: bool

    def too_large(self, state: IsvtState) -> bool:
        return bool(state.steps) and state.steps[-1].rose and not self.backtrack

    def advance(self, state: IsvtState) -> None:
        """Corrections, one thresholded step, and the new best."""
        number = len(state.steps)
        problem, costs = self.reduction.problem, self.reduction.costs
        problem.assign(state.weights)
        for _ in range(self.schedule.corrections):
            state.weights, state.size = self._correct(state.weights, state.size)
        loss, gradients = problem.gradients()
        # Corrections are not truncated: what they start a step from is of full rank.
        full = not state.history or self.schedule.corrections > 0
        ranks = dict.fromkeys(costs, None) if full else state.history[-1]
        size = state.size
        for _ in range(_BACKTRACKS):
            choice, proposal = self.reduction.step(state.weights, gradients, size, self.threshold, self.schedule, number)
            problem.assign(proposal)
            after = problem.value()
            if not self.backtrack or after <= self._bound(state.weights, proposal, loss, gradients, size):
                break
            size /= 2
        before = loss + choice.multiplier * self._penalty(state.weights, ranks, choice.factored)
        objective = after + choice.multiplier * self._penalty(proposal, choice.ranks, choice.factored)
        state.history.append(dict(choice.ranks))
        state.steps.append(
            IsvtStep(
                loss=after,
                multiplier=choice.multiplier,
                step=size,
                backtracks=round(log2(state.size / size)),
                nbytes=choice.nbytes,
                before=before,
                objective=objective,
                rose=not objective <= _slackened(before),
            )
        )
        state.size, state.weights = size, proposal
        if choice.nbytes <= self.reduction.allowed and after < state.best:
            state.best, state.best_step = after, number
            state.best_weights, state.best_ranks = proposal, dict(choice.ranks)

    def _correct(self, weights: dict[str, Tensor], size: float) -> tuple[dict[str, Tensor], float]:
        """One gradient step in the metric without a threshold."""
        problem, metrics = self.reduction.problem, self.reduction.metrics
        loss, gradients = problem.gradients()
        for _ in range(_BACKTRACKS):
            proposal = gradient_step(weights, gradients, metrics, size)
            problem.assign(proposal)
            if not self.backtrack or problem.value() <= self._bound(weights, proposal, loss, gradients, size):
                return proposal, size
            size /= 2
        problem.assign(weights)
        return weights, size

    def _bound(
        self,
        weights: Mapping[str, Tensor],
        proposal: Mapping[str, Tensor],
        loss: float,
        gradients: Mapping[str, Tensor],
        size: float,
    ) -> float:
        """What the loss at a proposal keeps below when the step is small enough."""
        return _slackened(loss + model_change(weights, proposal, gradients, self.reduction.metrics, size))

    def _penalty(self, weights: Mapping[str, Tensor], ranks: Mapping[str, int | None], factored: bool) -> float:
        """Bytes for hard thresholds, byte-weighted nuclear norms in the metric for soft ones."""
        costs = self.reduction.costs
        if self.threshold == "hard":
            full = {name: min(weight.shape) if factored else None for name, weight in weights.items()}
            return float(sum(cost.nbytes(ranks[name] or full[name]) for name, cost in costs.items()))
        with limited_threads():
            return sum(
                costs[name].unit * float(matrix_spectrum(weight, self.reduction.metrics[name]).squares.sqrt().sum())
                for name, weight in weights.items()
            )


def _slackened(value: float) -> float:
    """A bound with room for rounding."""
    return value + _SLACK * (1 + abs(value))


def _report(state: IsvtState, initial: float, reduction: Reduction, too_large: bool) -> IsvtReport:
    advice = ""
    if too_large:
        last = state.steps[-1]
        advice = (
            f"the objective rose from {last.before:.6g} to {last.objective:.6g} at step {len(state.steps)} of size "
            f"{last.step:.4g}: the step is too large for the loss; lower it, leave it out to measure 1/L, or let it backtrack"
        )
    return IsvtReport(
        initial=initial,
        best=state.best,
        best_step=state.best_step,
        nbytes=sum(cost.nbytes(state.best_ranks[name]) for name, cost in reduction.costs.items()),
        allowed=reduction.allowed,
        ranks=state.best_ranks,
        steps=tuple(state.steps),
        settled=state.settled,
        too_large=too_large,
        advice=advice,
    )
