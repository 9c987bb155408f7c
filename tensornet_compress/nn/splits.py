"""What takes the place of a module that hides its layers, or computes its weight from others."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from tensornet_compress.nn.kinds import KINDS, shell
from tensornet_compress.nn.module import COMPUTED, NetworkModule
from tensornet_compress.nn.split import SplitExperts, SplitModule, SplitParallel, SplitSorted
from tensornet_compress.nn.split_torch import SplitAttention, SplitBag, SplitBilinear, SplitRecurrent

_SPLITS: tuple[Any, ...] = (SplitExperts, SplitSorted, SplitParallel, SplitAttention, SplitRecurrent, SplitBilinear, SplitBag)


def split_kind(module: nn.Module) -> Any:
    """The class that takes a module's place, None for most."""
    return next((kind for kind in _SPLITS if kind.fits(module)), None)


def split_of(module: nn.Module) -> nn.Module | None:
    """An equal module made of layers, in the same memory; None for all others."""
    if isinstance(module, SplitModule | NetworkModule):
        return None
    if isinstance(module, tuple(base for base, _ in KINDS)):
        return _plain(module)
    kind = split_kind(module)
    return None if kind is None else kind(module)


@torch.no_grad()
def _plain(module: nn.Module) -> nn.Module | None:
    """A twin whose weight is a parameter, of a layer that computes it from others; None for all others."""
    training, computed = module.training, {}
    module.eval()
    if parametrize.is_parametrized(module):
        computed = {name: getattr(module, name).detach().clone() for name in module.parametrizations}  # type: ignore[union-attr]
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, WeightNorm):
            computed[hook.name] = hook.compute_weight(module).detach().clone()
        elif isinstance(hook, SpectralNorm):
            computed[hook.name] = hook.compute_weight(module, do_power_iteration=False).detach().clone()
    module.train(training)
    if "weight" not in computed:
        return None
    made = shell(module)
    made.__dict__[COMPUTED] = True
    if parametrize.is_parametrized(module):
        made.__class__ = type(module).__bases__[0]
    for name in computed:
        made.__dict__.pop(name, None)
        for held in (made._parameters, made._buffers):
            for key in [key for key in held if key.startswith(f"{name}_")]:
                del held[key]
    made._parameters.update({name: module._parameters[name] for name in made._parameters if name not in computed})
    for name, value in computed.items():
        made.register_parameter(name, nn.Parameter(value))
    return made.train(training)
