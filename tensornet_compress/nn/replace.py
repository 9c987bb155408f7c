"""Putting networks in the place of layers, and dense layers back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from tensornet_compress.errors import CheckpointError, TargetError
from tensornet_compress.nn.conv import TNConv, TNConv2d
from tensornet_compress.nn.embedding import TNEmbedding
from tensornet_compress.nn.kinds import HOLDERS, identity, module_kind
from tensornet_compress.nn.linear import TNLinear
from tensornet_compress.nn.module import COMPUTED, NetworkModule
from tensornet_compress.nn.plan import PLAN_ATTRIBUTE, Plan, drop_plan, keep_plan
from tensornet_compress.nn.split import SplitModule
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
    if kind in ("conv", "conv_transpose"):
        return TNConv.from_conv(module, network)
    if kind == "embedding" and isinstance(module, nn.Embedding):
        return TNEmbedding.from_embedding(module, network)
    raise TargetError(f"a {type(module).__name__} cannot hold a network; {HOLDERS} can")


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


def _shared_biases(model: nn.Module) -> dict[str, nn.Parameter]:
    """By module, the biases that something else holds too (the head of a masked language model), and goes on holding."""
    owners: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(parameter, []).append(name)
    shared = {name: parameter for parameter, names in owners.items() if len(names) > 1 for name in names}
    return {name.removesuffix(".bias"): parameter for name, parameter in shared.items() if name.endswith(".bias")}


def _save_pretrained(*_arguments: Any, **_keywords: Any) -> None:
    raise CheckpointError(
        "this is a part of what was compressed, and from_pretrained would load random weights in place of its networks; use "
        "tnc.save(model, folder) on the whole, or tnc.materialize(model) first"
    )


def _merge(*_arguments: Any, **_keywords: Any) -> None:
    raise TargetError(
        "the layer below this adapter is a network, and its computed weight cannot be written to; call tnc.materialize(model) "
        "before merging, or merge before tnc.compress"
    )


def _refuse_what_needs_weights(model: nn.Module) -> None:
    """Models of transformers inside the one that was compressed do not save themselves while they hold networks, and adapters
    of PEFT are not merged into a network, whose computed weight they would write to."""
    for module in model.modules():
        base = module._modules.get("base_layer")
        if base is not None and callable(getattr(type(module), "merge", None)) and type(module).__module__.startswith("peft."):
            if isinstance(base, NetworkModule):
                module.__dict__["merge"] = _merge
            else:
                module.__dict__.pop("merge", None)
        if module is not model and callable(getattr(type(module), "save_pretrained", None)):
            holds = any(isinstance(part, NetworkModule | SplitModule) for part in module.modules())
            if holds:
                module.__dict__["save_pretrained"] = _save_pretrained
            else:
                module.__dict__.pop("save_pretrained", None)


def install(model: nn.Module, networks: Mapping[str, TensorNetwork], plan: Plan) -> None:
    """Replace modules by their networks, let the modules that the plan ties to them share these, and keep the plan with the
    model."""
    biases = _shared_biases(model)
    for name, network in networks.items():
        replace_module(model, name, network, plan.layers[name].tied)
    for name, bias in biases.items():
        if isinstance(module := model.get_submodule(name), NetworkModule):
            module._parameters["bias"] = bias
    keep_plan(model, plan)
    _refuse_what_needs_weights(model)


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
        _refuse_what_needs_weights(self._model)
        with torch.no_grad():
            for parameter, values in self._vectors:
                parameter.copy_(values)


def materialize(model: nn.Module) -> nn.Module:
    """Every network module replaced by its dense original class, in place; tied modules stay tied, and modules that were split
    are joined again. Returns the model.

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
        if not isinstance(module, (TNLinear, TNConv, TNEmbedding)):
            continue
        if module not in dense_of:
            dense_of[module] = dense = module.materialize()
            first = sharing.setdefault((*identity(next(iter(module.stored().values()))), module_kind(dense) == "conv1d"), dense)
            dense.weight = first.weight
        set_submodule(model, name, dense_of[module])
    joined: dict[nn.Module, nn.Module] = {}
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if isinstance(module, SplitModule):
            joined[module] = joined[module] if module in joined else module.joined()
            set_submodule(model, name, joined[module])
    drop_plan(model)
    _refuse_what_needs_weights(model)
    if computed_weights(model) and callable(getattr(model, "save_pretrained", None)):
        model.__dict__["save_pretrained"] = _save_computed
    return model


def computed_weights(model: nn.Module) -> list[str]:
    """Dense layers whose weight the original computed from other parameters (weight_norm), which they no longer have."""
    return [
        name
        for name, module in model.named_modules()
        if module.__dict__.get(COMPUTED) and not isinstance(module, NetworkModule)
    ]


def _save_computed(*_arguments: Any, **_keywords: Any) -> None:
    raise CheckpointError(
        "layers of this model computed their weight from other parameters (weight_norm), which they no longer have: "
        "from_pretrained would draw them anew; save it before tnc.materialize, or save its state_dict"
    )
