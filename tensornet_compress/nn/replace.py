"""Putting networks in the place of layers, and dense layers back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from tensornet_compress.errors import TargetError
from tensornet_compress.nn.conv import TNConv2d
from tensornet_compress.nn.embedding import TNEmbedding
from tensornet_compress.nn.linear import TNLinear
from tensornet_compress.nn.module import NetworkModule, identity, module_kind
from tensornet_compress.nn.plan import PLAN_ATTRIBUTE, Plan, drop_plan, keep_plan
from tensornet_compress.tensor import TensorNetwork


def set_submodule(model: nn.Module, name: str, module: nn.Module) -> None:
    """Assign the module at a dotted name."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def build_replacement(module: nn.Module, network: TensorNetwork) -> NetworkModule:
    """The network module that stands for ``module``; bias, geometry, mode and device kept."""
    kind = module_kind(module)
    if kind in ("linear", "conv1d"):
        return TNLinear.from_linear(module, network)
    if kind == "conv2d" and isinstance(module, nn.Conv2d):
        return TNConv2d.from_conv2d(module, network)
    if kind == "embedding" and isinstance(module, nn.Embedding):
        return TNEmbedding.from_embedding(module, network)
    raise TargetError(f"a {type(module).__name__} cannot hold a network; Linear, Conv1D, Conv2d and Embedding can")


def replace_module(model: nn.Module, name: str, network: TensorNetwork, tied: tuple[str, ...] = ()) -> NetworkModule:
    """Replace the module at ``name``, and let the modules in ``tied`` share its parameters."""
    original = model.get_submodule(name)
    owners = [(other, model.get_submodule(other)) for other in tied]
    replacement = build_replacement(original, network)
    set_submodule(model, name, replacement)
    for other, module in owners:
        same = module is original
        set_submodule(model, other, replacement if same else build_replacement(module, network).share_network(replacement))
    return replacement


def install(model: nn.Module, networks: Mapping[str, TensorNetwork], plan: Plan) -> None:
    """Replace modules by their networks, let the modules that the plan ties to them share these, and keep the plan with the
    model."""
    for name, network in networks.items():
        replace_module(model, name, network, plan.layers[name].tied)
    keep_plan(model, plan)


class KeptModules:
    """Which module sits where in a model, its plan, and the vectors (norms, biases) that training changes in place, so that a
    compression can be undone."""

    def __init__(self, model: nn.Module):
        self._model, self._plan = model, getattr(model, PLAN_ATTRIBUTE, None)
        self._named = dict(model.named_modules())
        self._children = [(module, dict(module._modules)) for module in model.modules()]
        self._vectors = [(p, p.detach().clone()) for p in model.parameters() if p.ndim == 1]

    def module(self, name: str) -> nn.Module:
        """The module that sat at a dotted name."""
        return self._named[name]

    def put_back(self) -> None:
        """Make every module hold the children that it had, with the vectors that they had, and the model its plan."""
        if self._plan is None:
            drop_plan(self._model)
        else:
            keep_plan(self._model, self._plan)
        for module, children in self._children:
            module._modules.update(children)
        with torch.no_grad():
            for parameter, values in self._vectors:
                parameter.copy_(values)


def materialize(model: nn.Module) -> nn.Module:
    """Every network module replaced by its dense original class, in place; tied modules stay tied. Returns the model.

    >>> import torch, tensornet_compress as tnc
    >>> model = torch.nn.Sequential(torch.nn.Linear(32, 32))
    >>> report = tnc.compress(model, tnc.Budget(bits_per_weight=8.5), allocator="energy")
    >>> tnc.materialize(model)
    Sequential(
      (0): Linear(in_features=32, out_features=32, bias=True)
    )
    """
    dense_of: dict[nn.Module, nn.Module] = {}
    sharing: dict[tuple[Any, ...], nn.Module] = {}
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if not isinstance(module, (TNLinear, TNConv2d, TNEmbedding)):
            continue
        if module not in dense_of:
            dense_of[module] = dense = module.materialize()
            first = sharing.setdefault((*identity(next(iter(module.stored().values()))), module_kind(dense) == "conv1d"), dense)
            dense.weight = first.weight
        set_submodule(model, name, dense_of[module])
    drop_plan(model)
    return model
