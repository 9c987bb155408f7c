"""What a proximal iteration minimises: a loss as a function of the weight matrices of some layers, and its curvature."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tensornet_compress.calibrate import kept_output, model_inputs, total_divergence
from tensornet_compress.calibrate.hooks import autocast, evaluating, frozen
from tensornet_compress.errors import TensorNetError
from tensornet_compress.metric import KroneckerMetric
from tensornet_compress.nn import layer_weight, module_kind, turned

MeanLoss = Callable[[nn.Module, Any], Tensor]


class Problem:
    """``L`` of the weights of the named dense layers, each a matrix (out, in) in its own dtype; everything else is fixed.

    Without ``loss``, L is the divergence from what the model gives when the problem is made: KL per token of logits, half the
    squared distance of other outputs relative to their mean squared length. A ``loss(model, batch)`` is a mean over a batch.

    >>> import torch, tensornet_compress as tnc
    >>> x = torch.randn(64, 12)
    >>> data = [(x, x @ torch.randn(12, 8))]
    >>> loss = lambda model, batch: (model(batch[0]) - batch[1]).square().mean()
    >>> problem = tnc.train.Problem(torch.nn.Sequential(torch.nn.Linear(12, 8)), ["0"], data, loss)
    >>> value, gradients = problem.gradients()
    >>> gradients["0"].shape
    torch.Size([8, 12])
    """

    def __init__(
        self,
        model: nn.Module,
        names: Sequence[str],
        batches: Sequence[Any],
        loss: MeanLoss | None = None,
        precision: torch.dtype | None = None,
    ):
        if not batches:
            raise TensorNetError("calibration was given no batches")
        self.model, self.names, self.batches, self.precision = model, list(names), list(batches), precision
        self.device = next(model.parameters()).device
        self._loss = loss
        self._references: list[tuple[Tensor, bool]] = []
        if loss is None:
            with evaluating(model), torch.no_grad(), autocast(self.device, self.precision):
                for batch in self.batches:
                    output, logits = kept_output(model, model_inputs(batch, self.device))
                    target = output.float()
                    self._references.append((target.log_softmax(-1).half() if logits else target, logits))

    def weights(self) -> dict[str, Tensor]:
        """Copies of the weights as matrices (out, in)."""
        return {
            name: weight.reshape(weight.shape[0], -1).clone()
            for name in self.names
            for weight in [layer_weight(self.model.get_submodule(name))]
        }

    def assign(self, weights: Mapping[str, Tensor]) -> None:
        """Put weights into the model."""
        with torch.no_grad():
            for name, matrix in weights.items():
                module = self.model.get_submodule(name)
                weight: Any = module.weight
                weight.copy_(turned(matrix, module_kind(module)).reshape(weight.shape))

    def value(self) -> float:
        """The loss at the model's weights."""
        with evaluating(self.model), torch.no_grad():
            return sum(float(self._one(number)) for number in range(len(self.batches))) / len(self.batches)

    def gradients(self) -> tuple[float, dict[str, Tensor]]:
        """The loss, and its gradient with respect to each weight as a matrix (out, in)."""
        total = 0.0
        sums: dict[str, Tensor] = {}
        parameters: list[Any] = [self.model.get_submodule(name).weight for name in self.names]
        with frozen(self.model, trained=parameters), torch.enable_grad():
            for number in range(len(self.batches)):
                loss = self._one(number)
                total += float(loss.detach())
                found = torch.autograd.grad(loss, parameters, allow_unused=True)
                for name, gradient in zip(self.names, found):
                    if gradient is None:
                        raise TensorNetError(f"the loss does not depend on {name!r}; ignore that layer")
                    sums[name] = sums[name] + gradient if name in sums else gradient
        count = len(self.batches)
        return total / count, {name: self._as_matrix(name, gradient / count) for name, gradient in sums.items()}

    def _as_matrix(self, name: str, gradient: Tensor) -> Tensor:
        gradient = turned(gradient, module_kind(self.model.get_submodule(name)))
        return gradient.reshape(gradient.shape[0], -1)

    def _one(self, number: int) -> Tensor:
        with autocast(self.device, self.precision):
            if self._loss is None:
                return self._divergence(number)
            return self._loss(self.model, self.batches[number])

    def _divergence(self, number: int) -> Tensor:
        output, logits = kept_output(self.model, model_inputs(self.batches[number], self.device))
        target = self._references[number][0]
        if logits:
            return total_divergence(target, output, logits, normalised=True) / len(output)
        target = target.float()
        return 0.5 * (output.float() - target).square().sum(-1).mean() / target.square().sum(-1).mean()


def curvature(problem: Problem, metrics: Mapping[str, KroneckerMetric], iterations: int = 8, seed: int = 0) -> float:
    """The largest curvature L (in size) of the loss in the metric: power iteration on ``M^-1 H``, by gradient differences.

    On least squares, in the metric of its own Hessian, it is one.

    >>> import torch, tensornet_compress as tnc
    >>> from tensornet_compress.metric import KroneckerMetric
    >>> x = torch.randn(64, 12, dtype=torch.float64)
    >>> model = torch.nn.Sequential(torch.nn.Linear(12, 8, dtype=torch.float64))
    >>> loss = lambda model, batch: 0.5 * model(batch).square().sum(1).mean()
    >>> problem = tnc.train.Problem(model, ["0"], [x], loss)
    >>> round(tnc.train.curvature(problem, {"0": KroneckerMetric(columns=x.T @ x / 64)}), 3)
    1.0
    """
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
