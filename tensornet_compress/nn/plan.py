"""Plans: ``{module name: spec}`` for a model, plain data that reproduces a compression."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

from torch import nn

from tensornet_compress.errors import TensorNetError
from tensornet_compress.frozen import Frozen
from tensornet_compress.nn.conv import conv_geometry
from tensornet_compress.nn.module import CONVOLUTIONS
from tensornet_compress.nn.targets import Target
from tensornet_compress.tensor import NetworkSpec, TensorNetwork

# Where a compressed model keeps its plan.
PLAN_ATTRIBUTE = "tensornet_plan"


class LayerPlan(Frozen):
    """One layer: the spec of its weight and what its module needs beside it."""

    kind: Literal["linear", "conv1d", "conv2d", "embedding", "conv", "conv_transpose"]
    spec: NetworkSpec
    tied: tuple[str, ...] = ()
    bias: bool = False
    padding_idx: int | None = None
    geometry: dict[str, Any] | None = None


class Plan(Frozen):
    """Layers by name, the calibration that the numbers depend on (None without), the metric that was made from it, and the
    settings under which layers were fitted behind the compressed ones before them (None: on the dense model's inputs)."""

    version: Literal[1] = 1
    calibration: str | None = None
    metric: str = "input"
    sweeps: int = 1
    propagation: dict[str, Any] | None = None
    layers: dict[str, LayerPlan]

    def of_networks(self, networks: Mapping[str, TensorNetwork]) -> Plan:
        """The plan with the specs of networks that were made: entropy-coded cores have the bytes that they came to."""
        made = {name: self.layers[name].model_copy(update={"spec": network.spec}) for name, network in networks.items()}
        return self.model_copy(update={"layers": self.layers | made})


def layer_plan(target: Target, module: nn.Module, spec: NetworkSpec) -> LayerPlan:
    """Plan of a layer, read off the module before it is replaced."""
    return LayerPlan(
        kind=target.kind,  # type: ignore[arg-type]
        spec=spec,
        tied=target.tied,
        bias=getattr(module, "bias", None) is not None,
        padding_idx=getattr(module, "padding_idx", None),
        geometry=conv_geometry(module) if target.kind in CONVOLUTIONS else None,
    )


def plan_targets(model: nn.Module, plan: Plan) -> list[Target]:
    """The layers of a plan, as targets of a model.

    Raises:
        TensorNetError: the model lacks some of them.
    """
    known = dict(model.named_modules())
    missing = [name for name in plan.layers if name not in known]
    if missing:
        raise TensorNetError(f"the plan speaks of modules that the model lacks: {missing[:5]}")
    return [Target(name, layer.kind, layer.tied) for name, layer in plan.layers.items()]


def plan_of(model: nn.Module, targets: Iterable[Target], networks: Mapping[str, TensorNetwork], **made_with: Any) -> Plan:
    """The plan of a model whose targets are about to become networks; ``made_with``: its other fields."""
    layers = {
        target.name: layer_plan(target, model.get_submodule(target.name), networks[target.name].spec) for target in targets
    }
    return Plan(layers=layers, **made_with)
