"""What every lowering of ranks needs: how fast it goes, and the layers with their metrics, costs, and loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from tensornet_compress.calibrate.batches import calibration_fingerprint
from tensornet_compress.calibrate.collect import Loss
from tensornet_compress.calibrate.layer_metrics import calibrated_metrics
from tensornet_compress.coding import FloatFormat, format_nbytes, parse_format
from tensornet_compress.compressing import Budget
from tensornet_compress.compressing.sizes import Sizes
from tensornet_compress.decompose import realise
from tensornet_compress.errors import TensorNetError
from tensornet_compress.frozen import Frozen
from tensornet_compress.metric import KroneckerMetric
from tensornet_compress.nn import Target, find_targets, install, layer_weight
from tensornet_compress.nn.plan import plan_of
from tensornet_compress.tensor import Layout, NetworkSpec, TermSpec, Topology
from tensornet_compress.threads import limited_threads
from tensornet_compress.train.problem import MeanLoss, Problem
from tensornet_compress.train.proximal import Choice, Cost, Threshold, proximal_step

Kind = Literal["one-shot", "linear", "cubic", "cycles", "multiplier"]


class Schedule(Frozen):
    """Bytes or multiplier per step.

    * ``one-shot``: the final bytes at once, in one step;
    * ``linear``, ``cubic``: bytes fall from dense to final over the first ``ramp`` of the steps (cubic: fast, then slowly), and
      the rest corrects at the final size;
    * ``cycles``: the final bytes at every step, so that each is a truncate - correct - truncate cycle;
    * ``multiplier``: the price of a byte rises geometrically to the one that meets the budget, and bytes follow.

    ``corrections``: gradient steps without truncation before each thresholding, beside the one that belongs to it.

    >>> import tensornet_compress as tnc
    >>> schedule = tnc.train.Schedule(kind="linear", steps=4, ramp=1.0)
    >>> [schedule.allowed(step, largest=1000, final=200) for step in range(schedule.count)]
    [800, 600, 400, 200]
    """

    kind: Kind = "cycles"
    steps: int = Field(default=10, ge=1)
    ramp: float = Field(default=0.7, gt=0, le=1)
    corrections: int = Field(default=0, ge=0)
    start_share: float = Field(default=1e-2, gt=0, le=1)

    @property
    def count(self) -> int:
        """Thresholdings in all."""
        return 1 if self.kind == "one-shot" else self.steps

    def allowed(self, step: int, largest: int, final: int) -> int:
        """Bytes allowed after step ``step`` (0-based), between ``largest`` and ``final``."""
        if self.kind not in ("linear", "cubic") or largest <= final:
            return final
        ramp = max(1, round(self.ramp * self.count))
        left = max(0.0, 1 - (step + 1) / ramp)
        return final + int((largest - final) * (left**3 if self.kind == "cubic" else left))

    def price_share(self, step: int) -> float:
        """The multiplier of a step relative to that which meets the budget."""
        if self.kind != "multiplier":
            return 1.0
        ramp = max(1, round(self.ramp * self.count))
        return float(self.start_share ** max(0.0, 1 - (step + 1) / ramp))


@dataclass
class Reduction:
    """The layers of a model whose ranks are lowered: their metrics, what ranks cost, the bytes allowed in the end, and the loss
    as a function of their weights."""

    problem: Problem
    targets: list[Target]
    metrics: dict[str, KroneckerMetric]
    costs: dict[str, Cost]
    allowed: int
    fmt: FloatFormat
    made_with: dict[str, Any]

    @classmethod
    def of(
        cls,
        model: nn.Module,
        batches: Sequence[Any],
        budget: Budget,
        *,
        metric: str | Mapping[str, KroneckerMetric],
        metric_loss: Loss | None,
        loss: MeanLoss | None,
        fmt: str,
        targets: Sequence[str] | None,
        ignore: Sequence[str],
        precision: torch.dtype | None = None,
    ) -> Reduction:
        """The arguments of ``isvt``.

        Raises:
            BudgetError: the budget is used up by what is not targeted.
            TensorNetError: any other bad input.
        """
        number_format = parse_format(fmt)
        if not isinstance(number_format, FloatFormat):
            raise TensorNetError(f"rank reduction keeps floating-point cores, was given {fmt!r}; use bf16, fp16 or fp32")
        chosen = find_targets(model, targets, ignore)[0]
        allowed = Sizes.of(model, chosen, budget).allowed
        metrics = _metrics(model, batches, chosen, metric, metric_loss, precision)
        problem = Problem(model, [target.name for target in chosen], batches, loss, precision)
        costs = {name: layer_cost(weight, number_format) for name, weight in problem.weights().items()}
        return cls(problem, chosen, metrics, costs, allowed, number_format, _made_with(metric, batches))

    def step(
        self,
        weights: Mapping[str, Tensor],
        gradients: Mapping[str, Tensor] | None,
        size: float,
        threshold: Threshold,
        schedule: Schedule,
        number: int,
    ) -> tuple[Choice, dict[str, Tensor]]:
        """``proximal_step`` number ``number`` (0-based) of a schedule."""
        allowed = schedule.allowed(number, sum(cost.dense for cost in self.costs.values()), self.allowed)
        share = schedule.price_share(number)
        with limited_threads():
            return proximal_step(weights, gradients, self.metrics, self.costs, allowed, size, threshold, share)

    def install(self, weights: Mapping[str, Tensor], ranks: Mapping[str, int | None]) -> None:
        """Put networks of these ranks into the model, made from ``weights`` in the metric.

        With the plan that is left with the model ``apply_plan`` truncates the dense weights to these ranks in the metric,
        without what was trained; metrics that cannot be made again from token batches are not part of it.
        """
        model = self.problem.model
        networks = {}
        for target in self.targets:
            spec = rank_spec(layer_weight(model.get_submodule(target.name)), ranks[target.name], self.fmt)
            networks[target.name] = realise(weights[target.name].reshape(spec.shape), spec, self.metrics[target.name])
        install(model, networks, plan_of(model, self.targets, networks, **self.made_with))


def _metrics(
    model: nn.Module,
    batches: Sequence[Any],
    chosen: Sequence[Target],
    metric: str | Mapping[str, KroneckerMetric],
    loss: Loss | None,
    precision: torch.dtype | None,
) -> dict[str, KroneckerMetric]:
    """The metric of each target, calibrated by name or as given.

    Raises:
        TensorNetError: an unknown metric, one without a closed-form threshold, or a layer without one.
    """
    if isinstance(metric, str):
        device = next(model.parameters()).device
        found = calibrated_metrics(model, batches, chosen, metric, loss=loss, precision=precision)
        return {target.name: found.get(target.name, KroneckerMetric()).to(device) for target in chosen}
    missing = [target.name for target in chosen if target.name not in metric]
    if missing:
        raise TensorNetError(f"no metric was given for {missing[:5]}")
    return {target.name: metric[target.name] for target in chosen}


def _made_with(metric: str | Mapping[str, KroneckerMetric], batches: Sequence[Any]) -> dict[str, Any]:
    """What a plan says of its calibration."""
    if not isinstance(metric, str) or metric == "euclidean" or not all(isinstance(b, Tensor | Mapping) for b in batches):
        return {"metric": "euclidean"}
    return {"calibration": calibration_fingerprint(batches), "metric": metric}


def layer_cost(weight: Tensor, fmt: FloatFormat) -> Cost:
    """Bytes of a matrix (m, n) in a floating-point format: per unit of rank, and dense."""
    rows, columns = weight.shape
    return Cost(unit=format_nbytes(fmt, (rows + columns,)), dense=format_nbytes(fmt, (rows, columns)))


def rank_spec(weight: Tensor, rank: int | None, fmt: FloatFormat) -> NetworkSpec:
    """Two cores at a rank, or one core for None, that stand for ``weight``."""
    shape, dtype = tuple(weight.shape), str(weight.dtype).removeprefix("torch.")
    if rank is None:
        return NetworkSpec.dense(shape, fmt, dtype)
    topology = Topology.two_cores(len(shape), (0,))
    term = TermSpec(layout=Layout.native(shape), topology=topology, ranks=(rank,), formats=(fmt, fmt))
    return NetworkSpec.model_validate({"shape": shape, "dtype": dtype, "terms": (term,)})
