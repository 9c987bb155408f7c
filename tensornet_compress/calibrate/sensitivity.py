"""What errors of layers cost at the model's output: by probing each layer, from one backward pass, or at compressed weights.

To second order, an error ``D`` of a layer ``y = W x`` costs KL = 1/2 E[(g' D x)^2] per token, with ``g`` the gradient of the
log-likelihood of labels drawn from the model itself (the true Fisher information, 2507.09428) and products of different
tokens left out. For outputs that are not logits the same holds of one minus the cosine, with Gaussian labels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tensornet_compress.calibrate.batches import Batch, kept_output, model_inputs
from tensornet_compress.calibrate.blocks import Blocks, block_list, replaced_forwards
from tensornet_compress.calibrate.divergence import output_divergence, sampled_loss, total_divergence
from tensornet_compress.calibrate.hooks import (
    Backward,
    calls_and_gradients,
    evaluating,
    frozen,
    hooked,
    require_unchanged,
    version_of,
)
from tensornet_compress.errors import TensorNetError
from tensornet_compress.nn import module_kind

# A compressed weight, as the module stores it, and its squared error in the metric.
Probe = Callable[[], tuple[Tensor, float]]
# Name, module, its input, the gradient of its output.
Visit = Callable[[str, nn.Module, Tensor, Tensor], None]


def measure_sensitivity(
    model: nn.Module, batches: Sequence[Batch], probes: Mapping[str, Probe], advance: Callable[[], None] = lambda: None
) -> dict[str, float]:
    """Output divergence per unit of squared metric error, for each probed layer.

    A layer runs with its compressed weight alone while everything else stays exact. Blocks before the probed one replay their
    recorded outputs, which halves the work.
    """
    device = next(model.parameters()).device
    inputs = [model_inputs(batch, device) for batch in batches]
    blocks = block_list(model, list(probes))
    sensitivity = {}
    with evaluating(model), torch.no_grad():
        exact = [_recorded(model, batch, blocks) for batch in inputs]
        for name, probe in probes.items():
            weight, error = probe()
            depth = next((i for i, (prefix, _) in enumerate(blocks) if name.startswith(f"{prefix}.")), 0)
            total = 0.0
            with swapped_weights(model, {name: weight}):
                for batch, (reference, logits, outputs) in zip(inputs, exact):
                    with _replayed(blocks[:depth], outputs):
                        total += output_divergence(reference, kept_output(model, batch)[0], logits)
            sensitivity[name] = max(total / len(inputs), 0.0) / max(error, 1e-300)
            advance()
    return sensitivity


def _recorded(model: nn.Module, inputs: dict[str, Tensor], blocks: Blocks) -> tuple[Tensor, bool, list[Any]]:
    """The model's output, whether it holds logits, and what every block gave."""
    outputs: list[Any] = []
    with hooked(block.register_forward_hook(lambda _m, _i, output: outputs.append(output)) for _, block in blocks):
        return *kept_output(model, inputs), outputs


def _replayed(blocks: Blocks, outputs: Sequence[Any]) -> AbstractContextManager[None]:
    """Blocks give back what they gave before, without computing."""
    return replaced_forwards(blocks, lambda number, _block: lambda *_arguments, **_keywords: outputs[number])


def fisher_sensitivity(
    model: nn.Module,
    batches: Sequence[Batch],
    probes: Mapping[str, Probe],
    tied: Mapping[str, Sequence[str]] | None = None,
    advance: Callable[[], None] = lambda: None,
    seed: int = 0,
) -> dict[str, float]:
    """Output divergence per unit of squared metric error, for each probed layer, from one backward pass per batch.

    ``tied`` names modules that use a probed layer's weight too: what they lose counts with it.

    The model's mode, parameters, ``requires_grad`` flags, gradients and hooks are left as found, and torch's global generator
    is not used.

    Raises:
        TensorNetError: no gradient reaches the output, or a layer's input is changed in place.
    """
    device = next(model.parameters()).device
    generator = torch.Generator(device=device).manual_seed(seed)
    divergence = dict.fromkeys(probes, 0.0)
    tokens = 0

    def visit(name: str, module: nn.Module, given: Tensor, gradient: Tensor) -> None:
        """Add 1/2 (g' D x)^2 over tokens."""
        weight: Any = module.weight
        answer = _response(module, given, probes[name]()[0].to(weight) - weight)
        axis = 1 if isinstance(module, nn.Conv2d) else -1
        divergence[name] += 0.5 * float((answer * gradient).sum(axis).double().square().sum())

    with frozen(model), _visiting(model, probes, tied or {}, visit), torch.enable_grad():
        for batch in batches:
            output, is_logits = kept_output(model, model_inputs(batch, device))
            if not output.requires_grad:
                raise TensorNetError(
                    f"no gradient reaches the output of {type(model).__name__}; choose sensitivity='probe' instead"
                )
            sampled_loss(output, is_logits, generator).backward()
            tokens += len(output)
            advance()
    return {name: value / tokens / max(probes[name]()[1], 1e-300) for name, value in divergence.items()}


class OperatingPoint:
    """Measures compressed weights inside the original model on fixed batches; the model is left as found each time.

    Sensitivities of the exact model hold for small errors. At the compressed weights ``V`` the derivative of the divergence
    towards the original ``W`` is ``<grad KL, V - W>``; for a divergence that is a sum of ``s * error`` it equals
    ``2 s * error``, which gives an ``s`` that knows of large errors and of the other layers' errors.
    """

    def __init__(self, model: nn.Module, batches: Sequence[Batch], tied: Mapping[str, Sequence[str]]):
        device = next(model.parameters()).device
        self._model = model
        self._tied = tied
        self._inputs = [model_inputs(batch, device) for batch in batches]
        self._references: list[tuple[Tensor, bool]] = []
        with evaluating(model), torch.no_grad():
            for batch in self._inputs:
                output, logits = kept_output(model, batch)
                self._references.append((output.half() if logits else output, logits))

    def measure(
        self, weights: Mapping[str, Tensor], advance: Callable[[], None] = lambda: None
    ) -> tuple[float, dict[str, float]]:
        """Divergence per token with ``weights`` (as the modules store them) in place, and each layer's derivative of it
        towards those weights, ``<grad, V - W>``."""
        derivative = dict.fromkeys(weights, 0.0)
        total, tokens = 0.0, 0
        with (
            frozen(self._model),
            swapped_weights(self._model, weights) as originals,
            torch.enable_grad(),
        ):

            def visit(name: str, module: nn.Module, given: Tensor, gradient: Tensor) -> None:
                change = weights[name].to(originals[name]) - originals[name]
                derivative[name] += float((_response(module, given, change) * gradient).double().sum())

            with _visiting(self._model, weights, self._tied, visit):
                for batch, (reference, logits) in zip(self._inputs, self._references):
                    output, _ = kept_output(self._model, batch)
                    loss = total_divergence(reference, output, logits)
                    loss.backward()
                    total, tokens = total + float(loss.detach()), tokens + len(output)
                    advance()
        return total / tokens, {name: value / tokens for name, value in derivative.items()}


@contextmanager
def swapped_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """The model with other weights, as the modules store them; gives the original ones."""
    originals: dict[str, Tensor] = {}
    try:
        for name, weight in weights.items():
            parameter: Any = model.get_submodule(name).weight
            originals[name] = parameter.data
            parameter.data = weight.to(parameter.data)
        yield originals
    finally:
        for name, original in originals.items():
            swapped: Any = model.get_submodule(name).weight
            swapped.data = original


@contextmanager
def _visiting(model: nn.Module, names: Iterable[str], tied: Mapping[str, Sequence[str]], visit: Visit) -> Iterator[None]:
    """Call ``visit`` during the backward pass at every call of a named layer, or of one that is tied to it."""
    layers = {name: list(dict.fromkeys(map(model.get_submodule, (name, *tied.get(name, ()))))) for name in names}

    def see(name: str, module: nn.Module, given: Tensor, _output: Tensor) -> Backward:
        given = given.detach()
        version = version_of(given)

        def backward(gradient: Tensor) -> None:
            require_unchanged(given, version, name, "sensitivity='probe'")
            with torch.no_grad():
                visit(name, module, given, gradient)

        return backward

    with hooked(calls_and_gradients(layers, see)):
        yield


def _response(module: nn.Module, given: Tensor, change: Tensor) -> Tensor:
    """Change of a module's output when its weight changes."""
    kind = module_kind(module)
    if kind == "embedding":
        return F.embedding(given, change)
    if isinstance(module, nn.Conv2d):
        convolve: Any = module._conv_forward
        return convolve(given, change, None)
    return given @ change if kind == "conv1d" else F.linear(given, change)
