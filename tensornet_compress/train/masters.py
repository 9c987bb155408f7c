"""Training stored numbers: full-precision copies for a while, rounded back to what is stored at the end."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from tensornet_compress.errors import TensorNetError
from tensornet_compress.nn.module import NetworkModule


@contextmanager
def master_parameters(modules: Iterable[nn.Module]) -> Iterator[list[nn.Parameter]]:
    """Float cores, scales and offsets of the networks among ``modules``, and vectors (norms, biases) of all of them, as
    trainable float32 parameters.

    All other parameters of the modules are frozen inside the context. At the end each trained parameter is rounded to its own
    dtype in its own storage, so that modules that share it go on sharing it, and ``requires_grad`` flags are put back.

    Raises:
        TensorNetError: there is nothing to train.
    """
    owners: dict[int, tuple[nn.Parameter, list[tuple[nn.Module, str]]]] = {}
    flags: list[tuple[nn.Parameter, bool]] = []
    for module in dict.fromkeys(modules):
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            if _is_trainable(module, parameter):
                owners.setdefault(id(parameter), (parameter, []))[1].append((module, name))
            else:
                flags.append((parameter, parameter.requires_grad))
    if not owners:
        raise TensorNetError("nothing to train: no network, norm or bias among the given modules")
    masters: list[nn.Parameter] = []
    try:
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        for parameter, places in owners.values():
            master = nn.Parameter(parameter.detach().float().clone())
            masters.append(master)
            for module, name in places:
                module._parameters[name] = master
        yield masters
    finally:
        for (parameter, places), master in zip(owners.values(), masters):
            with torch.no_grad():
                parameter.copy_(_held(master, parameter.dtype))
            for module, name in places:
                module._parameters[name] = parameter
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def _is_trainable(module: nn.Module, parameter: Tensor) -> bool:
    return parameter.is_floating_point() and (isinstance(module, NetworkModule) or parameter.ndim == 1)


def _held(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Values within the range of ``dtype``: an infinity must never be stored."""
    largest = torch.finfo(dtype).max
    return values.detach().clamp(-largest, largest)


def relative_groups(parameters: Iterable[nn.Parameter], rate: float) -> list[dict[str, object]]:
    """Optimiser groups whose learning rate is ``rate`` times the root mean square of each parameter: cores, scales and norms
    differ in size by orders of magnitude, and Adam's steps do not."""
    return [{"params": [p], "lr": rate * max(float(p.detach().square().mean().sqrt()), 1e-12)} for p in parameters]
