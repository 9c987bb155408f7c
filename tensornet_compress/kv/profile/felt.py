"""What attention outputs feel of errors in what was cached, where queries do not meet it in a known way.

Models that expand what they cached, bias their scores, cap them or leave room for sinks, and decoders that also attend to an
encoder, are asked through gradients: a random mixture of a layer's outputs has, at every cached state, a gradient whose second
moment is that of all outputs together. It passes through one attention module at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tensornet_compress.calibrate.hooks import hooked
from tensornet_compress.errors import TensorNetError

Felt = dict[int, tuple[Tensor, Tensor]]
"""By layer: gradients at its keys and at its values, as these are cached, (batch, heads, tokens, width)."""


@contextmanager
def felt_by_outputs(model: nn.Module, mask: Tensor, generator: torch.Generator, felt: Felt, cache: Any) -> Iterator[None]:
    """Inside, a forward pass that fills ``cache`` leaves in ``felt`` gradients of a random mixture of every layer's outputs.

    Args:
        mask: (batch, tokens), zero where outputs do not count. cache: an empty ``DynamicCache``.

    Raises:
        TensorNetError: a module that caches gives something that does not depend on it.
    """
    running: list[nn.Module] = []
    # The module that caches, and what it cached.
    attending: dict[nn.Module, tuple[int, tuple[Tensor, Tensor]]] = {}
    plain = cache.update

    def update(keys: Tensor, values: Tensor, layer: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        held = plain(keys, values, layer, *args, **kwargs)
        leaves = held[0].detach().requires_grad_(), held[1].detach().requires_grad_()
        attending[running[-1]] = layer, leaves
        torch.set_grad_enabled(True)
        return leaves

    def leave(module: nn.Module, _given: Any, output: Any) -> Any:
        running.pop()
        if module not in attending:
            return None
        layer, leaves = attending.pop(module)
        torch.set_grad_enabled(False)
        parts = list(output) if isinstance(output, tuple) else [output]
        if not parts[0].requires_grad:
            raise TensorNetError(
                f"what layer {layer} gives does not depend on the keys and values it cached; choose metric='fisher'"
            )
        counted = mask.to(parts[0].device)[..., None].bool()
        mixture = torch.randn(parts[0].shape, generator=generator).to(parts[0]) * counted
        gradients = torch.autograd.grad(parts[0], leaves, mixture, allow_unused=True)
        felt[layer] = tuple(torch.zeros_like(s) if g is None else g for s, g in zip(leaves, gradients))  # type: ignore[assignment]
        parts = [part.detach() if isinstance(part, Tensor) else part for part in parts]
        return tuple(parts) if isinstance(output, tuple) else parts[0]

    handles = [module.register_forward_pre_hook(lambda module, _: running.append(module)) for module in model.modules()]
    handles += [module.register_forward_hook(leave) for module in model.modules()]
    cache.update = update
    with hooked(handles):
        try:
            yield
        finally:
            del cache.update
