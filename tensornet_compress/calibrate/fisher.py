"""Sensitivities of all layers from one backward pass.

To second order, an error ``D`` of a layer ``y = W x`` costs KL = 1/2 E[(g' D x)^2] per token, with ``g`` the gradient of the
log-likelihood of labels drawn from the model itself (the true Fisher information, 2507.09428) and products of different
tokens left out. For outputs that are not logits the same holds of one minus the cosine, with Gaussian labels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tensornet_compress.calibrate.modes import frozen
from tensornet_compress.calibrate.moments import Batch, model_inputs, require_unchanged, version_of
from tensornet_compress.calibrate.outputs import graph_start, kept_output, sampled_loss
from tensornet_compress.errors import TensorNetError
from tensornet_compress.nn import module_kind

# Name, module, its input, the gradient of its output.
Visit = Callable[[str, nn.Module, Tensor, Tensor], None]


def fisher_sensitivity(
    model: nn.Module,
    batches: Sequence[Batch],
    probes: Mapping[str, Callable[[], tuple[Tensor, float]]],
    tied: Mapping[str, Sequence[str]] | None = None,
    advance: Callable[[], None] = lambda: None,
    seed: int = 0,
) -> dict[str, float]:
    """Output divergence per unit of squared metric error, for each probed layer; see ``measure_sensitivity`` for ``probes``.

    ``tied`` names modules that use a probed layer's weight too: what they lose counts with it.

    The model's mode, parameters, ``requires_grad`` flags, gradients and hooks are left as found, and torch's global generator
    is not used.
    """
    device = next(model.parameters()).device
    generator = torch.Generator(device=device).manual_seed(seed)
    divergence = dict.fromkeys(probes, 0.0)
    tokens = 0

    def visit(name: str, module: nn.Module, given: Tensor, gradient: Tensor) -> None:
        """Add 1/2 (g' D x)^2 over tokens."""
        weight: Any = module.weight
        answer = response(module, given, probes[name]()[0].to(weight) - weight)
        axis = 1 if isinstance(module, nn.Conv2d) else -1
        divergence[name] += 0.5 * float((answer * gradient).sum(axis).double().square().sum())

    with frozen_evaluation(model), gradient_hooks(model, sharing(probes, tied or {}), visit), torch.enable_grad():
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


@contextmanager
def frozen_evaluation(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without parameter gradients; embeddings start the graph instead."""
    handles = [
        module.register_forward_hook(
            lambda _module, _inputs, output: graph_start(output) if torch.is_grad_enabled() else output
        )
        for module in model.modules()
        if isinstance(module, nn.Embedding)
    ]
    try:
        with frozen(model):
            yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def gradient_hooks(model: nn.Module, owners: Mapping[str, Sequence[str]], visit: Visit) -> Iterator[None]:
    """Call ``visit(name, module, input, gradient of the output)`` during the backward pass for the modules of each name."""

    def listen(name: str) -> Callable[[nn.Module, tuple[Any, ...], Tensor], None]:
        def forward(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
            given = inputs[0].detach()
            version = version_of(given)

            def backward(gradient: Tensor) -> None:
                require_unchanged(given, version, name, "sensitivity='probe'")
                with torch.no_grad():
                    visit(name, module, given, gradient)

            if output.requires_grad:
                output.register_hook(backward)

        return forward

    handles = [
        module.register_forward_hook(listen(name))
        for name, users in owners.items()
        for module in dict.fromkeys(map(model.get_submodule, users))
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def sharing(names: Iterable[str], tied: Mapping[str, Sequence[str]]) -> dict[str, tuple[str, ...]]:
    """Each name with the modules that use its weight: itself and those tied to it."""
    return {name: (name, *tied.get(name, ())) for name in names}


def response(module: nn.Module, given: Tensor, change: Tensor) -> Tensor:
    """Change of a module's output when its weight changes."""
    kind = module_kind(module)
    if kind == "embedding":
        return F.embedding(given, change)
    if isinstance(module, nn.Conv2d):
        convolve: Any = module._conv_forward
        return convolve(given, change, None)
    return given @ change if kind == "conv1d" else F.linear(given, change)
