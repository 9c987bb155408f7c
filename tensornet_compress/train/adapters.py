"""LoRA adapters of PEFT on a compressed model: the networks stay as they are while low-rank updates beside them are trained;
merging encodes each layer again in the formats of its plan."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from torch import nn

from tensornet_compress.calibrate import Batch
from tensornet_compress.calibrate.batches import calibration_fingerprint
from tensornet_compress.compressing.apply import networks_of_plan
from tensornet_compress.errors import TargetError, TensorNetError
from tensornet_compress.nn import TNLinear, install
from tensornet_compress.nn.plan import PLAN_ATTRIBUTE, Plan
from tensornet_compress.nn.replace import set_submodule

_ALL = "all-linear"
_OUTSIDE = (True, False, "gaussian", "orthogonal")
"""Starts of an adapter that leave the base weight as it is."""


def lora(model: nn.Module, adapter: LoraConfig | str | Path, **options: Any) -> PeftModel:
    """Put LoRA adapters beside the linear layers of a compressed model, for training or for use.

    Args:
        model: a compressed model (of ``tnc.compress``, ``tnc.load`` or ``from_pretrained``); changed in place, as by PEFT. What
            it stores stays as it is: only the adapters are trained.
        adapter: a ``peft.LoraConfig``, whose ``target_modules`` may be dense layers too (``"all-linear"``: all but the output
            head and what shares its weight); or a folder that ``save_pretrained`` of the result wrote.
        options: go on to ``peft.get_peft_model`` or ``peft.PeftModel.from_pretrained`` (``is_trainable=True``).

    >>> import torch, tensornet_compress as tnc
    >>> from peft import LoraConfig
    >>> model = torch.nn.Sequential(torch.nn.Linear(32, 32))
    >>> report = tnc.compress(model, tnc.Budget(bits_per_weight=8.5), allocator="energy")
    >>> adapted = tnc.train.lora(model, LoraConfig(r=4, target_modules=["0"]))
    >>> sorted(name.rpartition("0.")[2] for name, part in adapted.named_parameters() if part.requires_grad)
    ['lora_A.default.weight', 'lora_B.default.weight']

    Raises:
        TensorNetError: the model was not compressed, an adapter that changes the base weight (DoRA, PiSSA, biases), or one on
            a layer whose weight other layers share.
    """
    plan = _plan(model)
    config = adapter if isinstance(adapter, LoraConfig) else LoraConfig.from_pretrained(str(adapter))
    if config.lora_bias or config.use_dora or config.init_lora_weights not in _OUTSIDE:
        raise TensorNetError(
            "networks take plain LoRA; leave use_dora and lora_bias off, and init_lora_weights one of "
            f"{', '.join(map(repr, _OUTSIDE))}, not {config.init_lora_weights!r}"
        )
    shared = {name for first, layer in plan.layers.items() if layer.tied for name in (first, *layer.tied)}
    if config.target_modules == _ALL:
        head = getattr(model, "get_output_embeddings", lambda: None)()
        linear = [n for n, m in model.named_modules() if isinstance(m, TNLinear | nn.Linear) and m is not head]
        config = replace(config, target_modules=sorted(set(linear) - shared))
    hit = sorted(name for name in shared if check_target_module_exists(config, name))
    if hit:
        raise TargetError(f"{hit[0]!r} shares its weight with another layer, which an adapter would part; leave it out")
    config._register_custom_module({TNLinear: _LoraNetwork})
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Unsupported layer type .*TNLinear")
        if isinstance(adapter, LoraConfig):
            return get_peft_model(model, config, **options)
        return PeftModel.from_pretrained(model, str(adapter), config=config, **options)


def merge_lora(adapted: PeftModel, calibration: Iterable[Batch] | None = None, workers: int | None = None) -> nn.Module:
    """Add the active adapters to the weights that they belong to and encode these again; returns the base model without
    adapters, ready for ``tnc.save``.

    Every layer keeps its form and its number formats. Entropy-coded layers keep their step, so their bytes change a little.
    Layers without an adapter stay as they are, bit for bit.

    Args:
        calibration: batches that tell which errors of the new weights matter, best from the task that the adapters were
            trained on; needed if the plan was made with calibration. They need not be those of the plan.
        workers: threads that encode layers.

    >>> import torch, tensornet_compress as tnc
    >>> from peft import LoraConfig
    >>> model = torch.nn.Sequential(torch.nn.Linear(32, 32))
    >>> report = tnc.compress(model, tnc.Budget(bits_per_weight=8.5), allocator="energy")
    >>> adapted = tnc.train.lora(model, LoraConfig(r=4, target_modules=["0"]))
    >>> _ = torch.nn.init.normal_(adapted.get_parameter("base_model.model.0.lora_B.default.weight"), std=0.1)
    >>> wanted = adapted(x := torch.randn(5, 32)).detach()
    >>> merged = tnc.train.merge_lora(adapted)
    >>> torch.dist(merged(x), wanted) < 0.05 * wanted.norm()
    tensor(True)

    Raises:
        TensorNetError: the plan was made with calibration and none is given, or a merged weight is not finite.
    """
    base = adapted.get_base_model()
    plan, batches = _plan(base), list(calibration or [])
    if plan.calibration is not None and not batches:
        raise TensorNetError("the model was compressed with calibration; give merge_lora batches too, best of the new task")
    layers = {name: layer for name, layer in base.named_modules() if isinstance(layer, BaseTunerLayer)}
    dense = {name: layer.merged_layer() for name, layer in layers.items() if isinstance(layer, _LoraNetwork)}
    for name, layer in layers.items():
        if name not in dense:
            layer.merge(safe_merge=True)
    adapted.unload()
    for name, module in dense.items():
        set_submodule(base, name, module)
    part = plan.model_copy(update={"layers": {name: plan.layers[name] for name in dense}})
    networks = networks_of_plan(base, part, batches, workers)
    made_with = {"calibration": calibration_fingerprint(batches) if batches else None, "propagation": None}
    install(base, networks, plan.of_networks(networks).model_copy(update=made_with))
    return base


def _plan(model: nn.Module) -> Plan:
    plan = model.__dict__.get(PLAN_ATTRIBUTE)
    if not isinstance(plan, Plan):
        raise TensorNetError(f"this {type(model).__name__} was not compressed; call tnc.compress first, or PEFT itself")
    return plan


class _LoraNetwork(LoraLinear):
    """PEFT's LoRA layer around a ``TNLinear``."""

    @property
    def lora_variants(self) -> dict[tuple[str, ...], Any]:
        """Plain LoRA alone."""
        return {(): None}

    @torch.no_grad()
    def merged_layer(self) -> nn.Module:
        """The dense layer of base and active adapters."""
        base: Any = self.get_base_layer()
        layer = base.materialize()
        for name in self.active_adapters:
            if name in self.lora_A:
                delta = self.get_delta_weight(name)
                layer.weight += (delta.T if base.conv1d else delta).to(layer.weight.dtype)
        return layer

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """(out, in), whichever way round the layer keeps its weight."""
        self.fan_in_fan_out = False
        return super().get_delta_weight(adapter)

    def merge(self, *_: Any, **__: Any) -> None:
        """Merging a network is encoding it again, with the model's plan at hand."""
        raise TensorNetError("call tnc.train.merge_lora(model, calibration), which encodes the merged weights again")
