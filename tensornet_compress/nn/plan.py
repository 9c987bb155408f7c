"""Plans: ``{module name: spec}`` for a model, plain data that reproduces a compression."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

from torch import nn

from tensornet_compress.frozen import Frozen
from tensornet_compress.nn.conv import conv_geometry
from tensornet_compress.nn.targets import Target
from tensornet_compress.tensor import NetworkSpec, TensorNetwork

# Where a compressed model keeps its plan.
PLAN_ATTRIBUTE = "tensornet_plan"


class LayerPlan(Frozen):
    """One layer: the spec of its weight and what its module needs beside it."""

    kind: Literal["linear", "conv1d", "conv2d", "embedding"]
    spec: NetworkSpec
    tied: tuple[str, ...] = ()
    bias: bool = False
    padding_idx: int | None = None
    geometry: dict[str, Any] | None = None


class Plan(Frozen):
    """Layers by name, the calibration that the numbers depend on (None without), and the metric that was made from it."""

    version: Literal[1] = 1
    calibration: str | None = None
    metric: str = "input"
    sweeps: int = 1
    layers: dict[str, LayerPlan]


def layer_plan(target: Target, module: nn.Module, spec: NetworkSpec) -> LayerPlan:
    """Plan of a layer, read off the module before it is replaced."""
    return LayerPlan(
        kind=target.kind,  # type: ignore[arg-type]
        spec=spec,
        tied=target.tied,
        bias=getattr(module, "bias", None) is not None,
        padding_idx=getattr(module, "padding_idx", None),
        geometry=conv_geometry(module) if isinstance(module, nn.Conv2d) else None,
    )


def plan_of(model: nn.Module, targets: Iterable[Target], networks: Mapping[str, TensorNetwork], **made_with: Any) -> Plan:
    """The plan of a model whose targets are about to become networks; ``made_with``: its other fields."""
    layers = {
        target.name: layer_plan(target, model.get_submodule(target.name), networks[target.name].spec) for target in targets
    }
    return Plan(layers=layers, **made_with)
