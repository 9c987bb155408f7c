"""Plans: ``{module name: spec}`` for a model, plain data that reproduces a compression."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from importlib import import_module
from typing import Any, Literal

from torch import nn

from tensornet_compress.errors import TensorNetError
from tensornet_compress.frozen import Frozen
from tensornet_compress.nn.conv import conv_geometry
from tensornet_compress.nn.kinds import CONVOLUTIONS
from tensornet_compress.nn.targets import Target
from tensornet_compress.tensor import NetworkSpec, TensorNetwork

# Where a compressed model keeps its plan.
PLAN_ATTRIBUTE = "tensornet_plan"
_SAVE, _TIE = "save_pretrained", "tie_weights"


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


def keep_plan(model: nn.Module, plan: Plan) -> None:
    """Keep a plan with the model it was carried out on; from then on ``save_pretrained`` of a transformers model writes what
    ``tnc.save`` does, and ``tie_weights``, which looks for dense weights, leaves what is tied as it is."""
    setattr(model, PLAN_ATTRIBUTE, plan)
    if hasattr(model, _SAVE):
        setattr(model, _SAVE, partial(_save_pretrained, model))
        setattr(model, _TIE, _stay_tied)


def drop_plan(model: nn.Module) -> None:
    """Undo ``keep_plan``; transformers no longer takes the model for a quantised one."""
    for name in (PLAN_ATTRIBUTE, _SAVE, _TIE):
        model.__dict__.pop(name, None)
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        quantizer.remove_quantization_config(model)


def _stay_tied(*_: Any, **__: Any) -> None:
    """``PreTrainedModel.tie_weights`` of a compressed model, whose tied modules share their networks."""


def _save_pretrained(
    model: nn.Module,
    save_directory: Any,
    is_main_process: bool = True,
    state_dict: Mapping[str, Any] | None = None,
    push_to_hub: bool = False,
    **_: Any,
) -> None:
    """``PreTrainedModel.save_pretrained`` of a compressed model: files that are already in the folder stay. One file holds all
    tensors, however large.

    Raises:
        TensorNetError: tensors other than the model's, or a request to upload.
    """
    if push_to_hub:
        raise TensorNetError(
            "save_pretrained(push_to_hub=True) is not done for compressed models; call model.push_to_hub(name)"
        )
    if state_dict is not None and set(state_dict) != set(model.state_dict()):
        raise TensorNetError("save_pretrained was given tensors other than the compressed model's own; leave out state_dict")
    if is_main_process:
        # Saving lies above this room: through the front door.
        import_module("tensornet_compress").save(model, save_directory, keep=True)
