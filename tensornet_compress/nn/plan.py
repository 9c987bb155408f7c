"""Plans: ``{module name: spec}`` for a model, plain data that reproduces a compression."""

from __future__ import annotations

from typing import Any, Literal

from torch import nn

from tensornet_compress.frozen import Frozen
from tensornet_compress.nn.conv import conv_geometry
from tensornet_compress.nn.targets import Target
from tensornet_compress.tensor import NetworkSpec

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
