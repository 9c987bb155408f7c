"""Sensitivities at the operating point: what restoring a layer of the *compressed* model would gain.

Sensitivities of the exact model hold for small errors. At the compressed weights ``V`` the derivative of the divergence
towards the original ``W`` is ``<grad KL, V - W>``; for a divergence that is a sum of ``s * error`` it equals ``2 s * error``,
which gives an ``s`` that knows of large errors and of the other layers' errors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tensornet_compress.calibrate.divergence import token_divergence
from tensornet_compress.calibrate.fisher import frozen_evaluation, gradient_hooks, response, sharing
from tensornet_compress.calibrate.moments import Batch, model_inputs
from tensornet_compress.calibrate.outputs import kept_output


class OperatingPoint:
    """Measures compressed weights inside the original model on fixed batches; the model is left as found each time."""

    def __init__(self, model: nn.Module, batches: Sequence[Batch], tied: Mapping[str, Sequence[str]]):
        device = next(model.parameters()).device
        self._model = model
        self._tied = tied
        self._inputs = [model_inputs(batch, device) for batch in batches]
        self._references: list[Tensor] = []
        with frozen_evaluation(model), torch.no_grad():
            for batch in self._inputs:
                output, self._logits = kept_output(model, batch)
                self._references.append(output.half() if self._logits else output)

    def measure(
        self, weights: Mapping[str, Tensor], advance: Callable[[], None] = lambda: None
    ) -> tuple[float, dict[str, float]]:
        """Divergence per token with ``weights`` (as the modules store them) in place, and each layer's derivative of it
        towards those weights, ``<grad, V - W>``."""
        derivative = dict.fromkeys(weights, 0.0)
        total, tokens = 0.0, 0
        originals: dict[str, Tensor] = {}

        def visit(name: str, module: nn.Module, given: Tensor, gradient: Tensor) -> None:
            change = weights[name].to(originals[name]) - originals[name]
            derivative[name] += float((response(module, given, change) * gradient).double().sum())

        with (
            frozen_evaluation(self._model),
            _swapped(self._model, weights, originals),
            gradient_hooks(self._model, sharing(weights, self._tied), visit),
            torch.enable_grad(),
        ):
            for batch, reference in zip(self._inputs, self._references):
                output, _ = kept_output(self._model, batch)
                loss = token_divergence(reference, output, self._logits).sum()
                loss.backward()
                total, tokens = total + float(loss.detach()), tokens + len(output)
                advance()
        return total / tokens, {name: value / tokens for name, value in derivative.items()}


@contextmanager
def _swapped(model: nn.Module, weights: Mapping[str, Tensor], originals: dict[str, Tensor]) -> Iterator[None]:
    """The model with other weights; the original ones are noted in ``originals``."""
    try:
        for name, weight in weights.items():
            parameter: Any = model.get_submodule(name).weight
            originals[name] = parameter.data
            parameter.data = weight.to(parameter.data)
        yield
    finally:
        for name, original in originals.items():
            swapped: Any = model.get_submodule(name).weight
            swapped.data = original
