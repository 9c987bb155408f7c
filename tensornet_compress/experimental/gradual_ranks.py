"""Ranks lowered during fine-tuning: minibatch training of dense weights, with a threshold in the metric every few steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tensornet_compress.calibrate.collect import Loss
from tensornet_compress.calibrate.modes import evaluating
from tensornet_compress.compressing import Budget
from tensornet_compress.compressing.sizes import Sizes
from tensornet_compress.decompose import realise
from tensornet_compress.errors import TensorNetError
from tensornet_compress.frozen import Frozen
from tensornet_compress.metric import KroneckerMetric
from tensornet_compress.nn import find_targets, layer_weight, replace_module
from tensornet_compress.nn.plan import PLAN_ATTRIBUTE, LayerPlan, layer_plan
from tensornet_compress.progress import Progress, SilentProgress
from tensornet_compress.threads import limited_threads
from tensornet_compress.train import Problem, Schedule, proximal_step
from tensornet_compress.train.problem import MeanLoss
from tensornet_compress.train.setup import float_format, layer_cost, layer_metrics, rank_spec, reduced_plan
from tensornet_compress.train.threshold import Choice, Threshold


class GradualReport(Frozen):
    """Loss of every training step, bytes after each threshold, the bytes allowed, and the final ranks (None: dense)."""

    losses: tuple[float, ...]
    nbytes: tuple[int, ...]
    allowed: int
    ranks: dict[str, int | None]


def reduce_gradually(
    model: nn.Module,
    batches: Sequence[Any],
    budget: Budget,
    *,
    loss: MeanLoss,
    schedule: Schedule,
    steps: int,
    rate: float = 1e-3,
    metric: str | Mapping[str, KroneckerMetric] = "kronecker",
    metric_loss: Loss | None = None,
    threshold: Threshold = "hard",
    fmt: str = "bf16",
    targets: Sequence[str] | None = None,
    ignore: Sequence[str] = (),
    progress: Progress | None = None,
) -> GradualReport:
    """Train all parameters for ``steps`` minibatch steps of Adam, and threshold the targeted weights in between.

    The thresholds of ``schedule`` are spread evenly, the last one after the last step; ``one-shot`` truncates only then. Layers
    then become two-core networks in place, ready for ``heal`` and ``tnc.save``. Other arguments as for ``isvt``.

    Raises:
        BudgetError: the budget cannot be met.
        TensorNetError: any other bad input.
    """
    if not 0 < schedule.count <= max(steps, 1) or rate <= 0:
        raise TensorNetError(
            f"{schedule.count} thresholds need as many steps and a positive rate; was given {steps} and {rate}"
        )
    number_format = float_format(fmt)
    chosen = find_targets(model, targets, ignore)[0]
    names = [target.name for target in chosen]
    allowed = Sizes.of(model, chosen, budget).allowed
    metrics = layer_metrics(model, batches, names, metric, metric_loss, None)
    problem = Problem(model, names, batches, loss)
    costs = {name: layer_cost(weight, number_format) for name, weight in problem.weights().items()}
    largest = sum(cost.dense for cost in costs.values())
    ends = [round(steps * (stage + 1) / schedule.count) for stage in range(schedule.count)]
    optimiser = torch.optim.Adam([p for p in model.parameters() if p.is_floating_point()], lr=rate)
    losses: list[float] = []
    sizes: list[int] = []

    def lower(stage: int) -> Choice:
        weights = problem.weights()
        with limited_threads():
            choice, reduced = proximal_step(
                weights,
                None,
                metrics,
                costs,
                schedule.allowed(stage, largest, allowed),
                1.0,
                threshold,
                schedule.price_share(stage),
            )
        problem.assign(reduced)
        sizes.append(choice.nbytes)
        return choice

    with (progress or SilentProgress()).stage("reduce", steps) as advance, evaluating(model):
        for stage, end in enumerate(ends):
            while len(losses) < end:
                losses.append(_train_step(model, optimiser, loss, batches[len(losses) % len(batches)]))
                advance()
            choice = lower(stage)
    for parameter in model.parameters():
        parameter.grad = None
    layers: dict[str, LayerPlan] = {}
    for target in chosen:
        module = model.get_submodule(target.name)
        weight = layer_weight(module).contiguous()
        spec = rank_spec(weight, choice.ranks[target.name], number_format)
        layers[target.name] = layer_plan(target, module, spec)
        replace_module(model, target.name, realise(weight, spec, metrics[target.name]), target.tied)
    setattr(model, PLAN_ATTRIBUTE, reduced_plan(layers, metric, batches))
    return GradualReport(losses=tuple(losses), nbytes=tuple(sizes), allowed=allowed, ranks=choice.ranks)


def _train_step(model: nn.Module, optimiser: torch.optim.Optimizer, loss: MeanLoss, batch: Any) -> float:
    optimiser.zero_grad(set_to_none=True)
    with torch.enable_grad():
        value: Tensor = loss(model, batch)
        value.backward()
    if not torch.isfinite(value):
        raise TensorNetError(f"the loss became {float(value.detach())}; lower the rate")
    optimiser.step()
    return float(value.detach())
