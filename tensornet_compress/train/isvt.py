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
from dataclasses import dataclass, field
from math import log2
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tensornet_compress.calibrate.collect import Loss
from tensornet_compress.compressing import Budget
from tensornet_compress.compressing.sizes import Sizes
from tensornet_compress.decompose import matrix_spectrum, realise
from tensornet_compress.errors import TensorNetError
from tensornet_compress.frozen import Frozen
from tensornet_compress.metric import KroneckerMetric
from tensornet_compress.nn import find_targets, layer_weight, replace_module
from tensornet_compress.nn.plan import PLAN_ATTRIBUTE, LayerPlan, layer_plan
from tensornet_compress.progress import Progress, SilentProgress
from tensornet_compress.threads import limited_threads
from tensornet_compress.train.problem import MeanLoss, Problem
from tensornet_compress.train.proximal import curvature, gradient_step, model_change, proximal_step
from tensornet_compress.train.schedule import Schedule
from tensornet_compress.train.setup import float_format, layer_cost, layer_metrics, rank_spec, reduced_plan
from tensornet_compress.train.state import content_hash, load_state, save_state
from tensornet_compress.train.threshold import Cost, Threshold

_SLACK = 1e-6
_BACKTRACKS = 30


class IsvtStep(Frozen):
    """One accepted step. ``objective`` is ``loss + multiplier * nbytes`` before (behind the corrections of this step, which are
    of full rank) and after, under this step's multiplier; ``rose`` tells that it did not fall."""

    loss: float
    multiplier: float
    step: float
    backtracks: int
    nbytes: int
    before: float
    objective: float
    rose: bool


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


@dataclass
class _State:
    weights: dict[str, Tensor]
    steps: list[IsvtStep] = field(default_factory=list)
    history: list[dict[str, int | None]] = field(default_factory=list)
    size: float = 1.0
    best: float = float("inf")
    best_step: int = -1
    best_weights: dict[str, Tensor] = field(default_factory=dict)
    best_ranks: dict[str, int | None] = field(default_factory=dict)


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

    Raises:
        BudgetError: the budget cannot be met.
        TensorNetError: any other bad input.
    """
    schedule = schedule or Schedule()
    if threshold not in ("hard", "soft"):
        raise TensorNetError(f"unknown threshold {threshold!r}; choose hard or soft")
    if step is not None and not step > 0:
        raise TensorNetError(f"step must be positive, was given {step}")
    number_format = float_format(fmt)
    chosen = find_targets(model, targets, ignore)[0]
    names = [target.name for target in chosen]
    allowed = Sizes.of(model, chosen, budget).allowed
    metrics = layer_metrics(model, batches, names, metric, metric_loss, precision)
    problem = Problem(model, names, batches, loss, precision)
    dense = problem.weights()
    costs = {name: layer_cost(weight, number_format) for name, weight in dense.items()}
    iteration = _Iteration(problem, metrics, costs, allowed, schedule, threshold, backtrack)
    file = None if state is None else Path(state)
    settings: dict[str, Any] = {}
    current = _State(dense)
    if file is not None:
        settings = {"allowed": allowed, "threshold": threshold, "schedule": schedule.model_dump(), "names": names, "step": step}
        settings |= {"fmt": fmt, "backtrack": backtrack, "precision": str(precision), "dense": content_hash(dense)}
        factors = {name: (given.rows, given.columns) for name, given in metrics.items()}
        settings |= {"metric": metric if isinstance(metric, str) else content_hash(factors)}
        settings |= {"batches": content_hash(list(batches)), "loss": getattr(loss, "__qualname__", str(type(loss)))}
        current = _resumed(file, settings, dense)
    if not current.steps:
        with limited_threads():
            current.size = step if step is not None else 1 / max(curvature(problem, metrics), 1e-30)
    initial = problem.value()
    try:
        with (progress or SilentProgress()).stage("isvt", schedule.count) as advance:
            while len(current.steps) < schedule.count and not iteration.too_large(current):
                iteration.advance(current)
                if file is not None:
                    _save(file, settings, current)
                advance()
    except BaseException:
        problem.assign(dense)
        raise
    if not current.best_ranks:
        problem.assign(dense)
        raise TensorNetError("no iterate met the budget with a finite loss; give a smaller step, or let it backtrack")
    problem.assign(dense)
    layers: dict[str, LayerPlan] = {}
    for target in chosen:
        module = model.get_submodule(target.name)
        network_spec = rank_spec(layer_weight(module), current.best_ranks[target.name], number_format)
        weight = current.best_weights[target.name].reshape(network_spec.shape)
        layers[target.name] = layer_plan(target, module, network_spec)
        replace_module(model, target.name, realise(weight, network_spec, metrics[target.name]), target.tied)
    setattr(model, PLAN_ATTRIBUTE, reduced_plan(layers, metric, batches))
    return _report(current, initial, allowed, costs, iteration.too_large(current))


@dataclass
class _Iteration:
    problem: Problem
    metrics: Mapping[str, KroneckerMetric]
    costs: Mapping[str, Cost]
    allowed: int
    schedule: Schedule
    threshold: Threshold
    backtrack: bool

    @property
    def largest(self) -> int:
        return sum(cost.dense for cost in self.costs.values())

    def too_large(self, state: _State) -> bool:
        return bool(state.steps) and state.steps[-1].rose and not self.backtrack

    def advance(self, state: _State) -> None:
        """Corrections, one thresholded step, and the new best."""
        number = len(state.steps)
        self.problem.assign(state.weights)
        for _ in range(self.schedule.corrections):
            state.weights, state.size = self._correct(state.weights, state.size)
        loss, gradients = self.problem.gradients()
        # Corrections are not truncated: what they start a step from is of full rank.
        full = not state.history or self.schedule.corrections > 0
        ranks = dict.fromkeys(self.costs, None) if full else state.history[-1]
        allowed = self.schedule.allowed(number, self.largest, self.allowed)
        share = self.schedule.price_share(number)
        size = state.size
        for _ in range(_BACKTRACKS):
            with limited_threads():
                choice, proposal = proximal_step(
                    state.weights, gradients, self.metrics, self.costs, allowed, size, self.threshold, share
                )
            self.problem.assign(proposal)
            after = self.problem.value()
            bound = loss + model_change(state.weights, proposal, gradients, self.metrics, size)
            if not self.backtrack or after <= bound + _SLACK * (1 + abs(bound)):
                break
            size /= 2
        before = loss + choice.multiplier * self._penalty(state.weights, ranks, choice.factored)
        objective = after + choice.multiplier * self._penalty(proposal, choice.ranks, choice.factored)
        rose = not objective <= before + _SLACK * (1 + abs(before))
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
                rose=rose,
            )
        )
        state.size, state.weights = size, proposal
        if choice.nbytes <= self.allowed and after < state.best:
            state.best, state.best_step = after, number
            state.best_weights, state.best_ranks = proposal, dict(choice.ranks)

    def _penalty(self, weights: Mapping[str, Tensor], ranks: Mapping[str, int | None], factored: bool) -> float:
        """Bytes for hard thresholds, byte-weighted nuclear norms in the metric for soft ones."""
        if self.threshold == "hard":
            full = {name: min(weight.shape) if factored else None for name, weight in weights.items()}
            return float(sum(cost.nbytes(ranks[name] or full[name]) for name, cost in self.costs.items()))
        with limited_threads():
            return sum(
                self.costs[name].unit * float(matrix_spectrum(weight, self.metrics[name]).squares.sqrt().sum())
                for name, weight in weights.items()
            )

    def _correct(self, weights: dict[str, Tensor], size: float) -> tuple[dict[str, Tensor], float]:
        """One gradient step in the metric without a threshold."""
        loss, gradients = self.problem.gradients()
        for _ in range(_BACKTRACKS):
            proposal = gradient_step(weights, gradients, self.metrics, size)
            self.problem.assign(proposal)
            bound = loss + model_change(weights, proposal, gradients, self.metrics, size)
            if not self.backtrack or self.problem.value() <= bound + _SLACK * (1 + abs(bound)):
                return proposal, size
            size /= 2
        self.problem.assign(weights)
        return weights, size


def _report(state: _State, initial: float, allowed: int, costs: Mapping[str, Cost], too_large: bool) -> IsvtReport:
    advice = ""
    if too_large:
        last = state.steps[-1]
        advice = (
            f"the objective rose from {last.before:.6g} to {last.objective:.6g} at step {len(state.steps)} of size "
            f"{last.step:.4g}: the step is too large for the loss; lower it, leave it out to measure 1/L, or let it backtrack"
        )
    settled = 0
    for ranks in reversed(state.history):
        if ranks != state.history[-1]:
            break
        settled += 1
    return IsvtReport(
        initial=initial,
        best=state.best,
        best_step=state.best_step,
        nbytes=sum(cost.nbytes(state.best_ranks[name]) for name, cost in costs.items()),
        allowed=allowed,
        ranks=state.best_ranks,
        steps=tuple(state.steps),
        settled=settled,
        too_large=too_large,
        advice=advice,
    )


def _save(file: Path, settings: Mapping[str, Any], state: _State) -> None:
    tensors = {f"current.{name}": weight for name, weight in state.weights.items()}
    tensors |= {f"best.{name}": weight for name, weight in state.best_weights.items()}
    log = {
        "steps": [step.model_dump() for step in state.steps],
        "history": state.history,
        "size": state.size,
        "best": None if state.best_step < 0 else state.best,
        "best_step": state.best_step,
        "best_ranks": state.best_ranks,
    }
    save_state(file, settings, log, tensors)


def _resumed(file: Path, settings: Mapping[str, Any], dense: dict[str, Tensor]) -> _State:
    found = load_state(file, settings)
    if found is None:
        return _State(dense)
    log, tensors = found
    return _State(
        weights={name: tensors[f"current.{name}"] for name in dense},
        steps=[IsvtStep.model_validate(step) for step in log["steps"]],
        history=log["history"],
        size=log["size"],
        best=float("inf") if log["best"] is None else log["best"],
        best_step=log["best_step"],
        best_weights={name: tensors[f"best.{name}"] for name in dense if f"best.{name}" in tensors},
        best_ranks=log["best_ranks"],
    )
