"""Ranks lowered during fine-tuning: minibatch training of dense weights, with a threshold in the metric every few steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tensornet_compress.calibrate.collect import Loss
from tensornet_compress.calibrate.hooks import evaluating
from tensornet_compress.compressing import Budget
from tensornet_compress.errors import TensorNetError
from tensornet_compress.frozen import Frozen
from tensornet_compress.metric import KroneckerMetric
from tensornet_compress.progress import Progress, SilentProgress
from tensornet_compress.train import Schedule
from tensornet_compress.train.problem import MeanLoss
from tensornet_compress.train.proximal import Threshold
from tensornet_compress.train.reduction import Reduction


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

    >>> import torch, tensornet_compress as tnc
    >>> x = torch.randn(64, 12)
    >>> data = [(x, x @ torch.randn(12, 8))]
    >>> loss = lambda model, batch: (model(batch[0]) - batch[1]).square().mean()
    >>> model, schedule = torch.nn.Sequential(torch.nn.Linear(12, 8)), tnc.train.Schedule(kind="cubic", steps=2)
    >>> options = dict(loss=loss, schedule=schedule, steps=4, metric="euclidean", fmt="fp32")
    >>> report = tnc.train.reduce_gradually(model, data, tnc.Budget(bits_per_weight=16), **options)
    >>> len(report.losses), len(report.nbytes)
    (4, 2)

    Raises:
        BudgetError: the budget cannot be met.
        TensorNetError: any other bad input.
    """
    if not 0 < schedule.count <= max(steps, 1) or rate <= 0:
        raise TensorNetError(
            f"{schedule.count} thresholds need as many steps and a positive rate; was given {steps} and {rate}"
        )
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
    )
    problem = reduction.problem
    optimiser = torch.optim.Adam([p for p in model.parameters() if p.is_floating_point()], lr=rate)
    losses: list[float] = []
    sizes: list[int] = []
    with (progress or SilentProgress()).stage("reduce", steps) as advance, evaluating(model):
        for number in range(schedule.count):
            while len(losses) < round(steps * (number + 1) / schedule.count):
                losses.append(_train_step(model, optimiser, loss, batches[len(losses) % len(batches)]))
                advance()
            choice, reduced = reduction.step(problem.weights(), None, 1.0, threshold, schedule, number)
            problem.assign(reduced)
            sizes.append(choice.nbytes)
    for parameter in model.parameters():
        parameter.grad = None
    reduction.install(problem.weights(), choice.ranks)
    return GradualReport(losses=tuple(losses), nbytes=tuple(sizes), allowed=reduction.allowed, ranks=choice.ranks)


def _train_step(model: nn.Module, optimiser: torch.optim.Optimizer, loss: MeanLoss, batch: Any) -> float:
    optimiser.zero_grad(set_to_none=True)
    with torch.enable_grad():
        value: Tensor = loss(model, batch)
        value.backward()
    if not torch.isfinite(value):
        raise TensorNetError(f"the loss became {float(value.detach())}; lower the rate")
    optimiser.step()
    return float(value.detach())
