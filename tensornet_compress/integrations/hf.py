"""Saved folders as a quantisation method of transformers: ``from_pretrained`` reads them tensor by tensor, onto any device."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

# By their modules: while transformers.quantizers is being imported, its own names are not there yet.
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.utils import cached_file
from transformers.utils.quantization_config import QuantizationConfigMixin

from tensornet_compress.errors import CheckpointError, TensorNetError
from tensornet_compress.files import MANIFEST, TENSORS
from tensornet_compress.files.load import Header, check_contents, contents, replaced_names, replacements
from tensornet_compress.files.manifest import FORMAT_VERSION, QUANT_METHOD, Manifest
from tensornet_compress.nn import NetworkModule, TNLinear, decode_all, materialize
from tensornet_compress.nn.plan import Plan, keep_plan
from tensornet_compress.nn.replace import set_submodule
from tensornet_compress.nn.split import SplitModule
from tensornet_compress.nn.splitting import split_for
from tensornet_compress.tensor import check_stored, expected_parts
from tensornet_compress.tensor.spec import DTYPES


def add_to_tables() -> None:
    """Enter the method into transformers' tables; again changes nothing."""
    AUTO_QUANTIZATION_CONFIG_MAPPING[QUANT_METHOD] = TensorNetConfig
    AUTO_QUANTIZER_MAPPING[QUANT_METHOD] = TensorNetQuantizer


class TensorNetConfig(QuantizationConfigMixin):
    """``quantization_config`` of a saved folder: the version of its format, the dtype that the model computes in, and the index
    of its files of weights where there are several.

    The plan lies beside the tensors, in ``tensornet.json``.
    """

    def __init__(
        self,
        format_version: int = FORMAT_VERSION,
        dtype: str = "float32",
        quant_method: str = QUANT_METHOD,
        weights: str | None = None,
    ):
        if format_version != FORMAT_VERSION:
            raise CheckpointError(f"the folder has format version {format_version!r}, this release reads {FORMAT_VERSION}")
        self.quant_method: Any = quant_method
        self.format_version, self.dtype = format_version, dtype
        if weights is not None:
            self.weights = weights


class TensorNetQuantizer(HfQuantizer):
    """Puts networks, still without numbers, in the place of layers before transformers loads the tensors of a saved folder,
    and what is made of the numbers afterwards."""

    quantization_config: TensorNetConfig
    requires_calibration = True
    is_trainable = True
    is_compileable = True

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        """``save_pretrained`` writes the folder again."""
        return True

    def update_attn_implementation(self, config: Any) -> Any:
        """Called before transformers looks for the file of weights: puts its name in the place of the refusal."""
        config.transformers_weights = getattr(self.quantization_config, "weights", TENSORS)
        return config

    # What 5.16 calls at the same place.
    update_tp_plan = update_attn_implementation

    def update_weight_conversions(self, weight_conversions: list[Any], *_: Any) -> list[Any]:
        """Tensors are named as in the running model: nothing is converted."""
        return []

    def _process_model_before_weight_loading(self, model: Any, checkpoint_files: Any = None, **_: Any) -> None:
        folder = _whole_folder(Path(checkpoint_files[0]), model.config)
        manifest, plan, header = contents(folder)
        _prepare(model, replaced_names(plan))
        if manifest.architecture == type(model).__name__:
            check_contents(model, plan, manifest, header)
        plan, manifest, header = _as_named_in(model, plan, manifest, header)
        name = str(model.config.dtype).removeprefix("torch.")
        cast = name in DTYPES and name != self.quantization_config.dtype
        if cast:
            plan = _computing_in(plan, name)
        lacking = [
            n for name, layer in plan.layers.items() for p in expected_parts(layer.spec) if (n := f"{name}.{p}") not in header
        ]
        if lacking:
            raise CheckpointError(f"{TENSORS} lacks {lacking[:5]}, which the plan speaks of")
        # Index tensors of orders hold numbers, so they are made beside the meta device that everything else is on.
        with torch.device("cpu"):
            described = {key: torch.empty(shape, dtype=kind, device="meta") for key, (shape, kind) in header.items()}
            made = replacements(model, plan, manifest.shared, described)
        self._plan, self._tied = plan, {other: first for first, layer in plan.layers.items() for other in layer.tied}
        for module_name, module in made.items():
            placed = _placeholder(module) if module_name in self._tied else module
            # All of its tensors come from the file: transformers has nothing to draw for it.
            placed._is_hf_initialized = True
            set_submodule(model, module_name, placed)
        if not cast:
            _as_stored(model, header, replaced_names(plan))
        inside = [key for key in header if "order" in key.rpartition(".")[2] and key.rpartition(".")[0] in plan.layers]
        model._keys_to_ignore_on_load_unexpected = {
            *(model._keys_to_ignore_on_load_unexpected or ()),
            *(f"^{key.replace('.', '[.]')}$" for key in inside),
        }
        kept = dict(model.named_parameters(remove_duplicate=False))
        model.all_tied_weights_keys = {
            key: source for key, source in model.all_tied_weights_keys.items() if key in kept and source in kept
        }

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        model.config.__dict__.pop("transformers_weights", None)
        for name in self._plan.layers:
            module = model.get_submodule(name)
            if any(tensor.is_meta for tensor in module.stored().values()):
                raise TensorNetError(f"{name!r} is offloaded, which networks cannot be; choose another device_map")
            check_stored(module.spec, module.stored())
        made: dict[str, Any] = {name: model.get_submodule(name) for name in self._plan.layers}
        decode_all(made)
        for module in made.values():
            _read_numbers(module)
        for other, first in self._tied.items():
            _tie(model, other, first)
        keep_plan(model, self._plan)
        return model

    def _dequantize(self, model: Any, dtype: Any = None) -> Any:
        return materialize(model).to(dtype)


def _whole_folder(weights: Path, config: Any) -> Path:
    """The folder of a file of weights, with its manifest fetched when it comes from a hub."""
    if not (weights.parent / MANIFEST).is_file() and not Path(config.name_or_path).is_dir():
        cached_file(config.name_or_path, MANIFEST, revision=getattr(config, "_commit_hash", None))
    return weights.parent


def _prepare(model: Any, named: Iterable[str]) -> None:
    """Make the modules that a plan names such that networks can take their place: those of split modules, and embeddings that
    scale what they look up, which nobody can tell on the meta device, so that their buffers are made of numbers."""
    prefix = f"{model.base_model_prefix}."
    # Another class of the same family has them under other names.
    names = {other for name in named for other in (name, name.removeprefix(prefix), prefix + name)}
    split_for(model, sorted(names))
    for name, part in list(model.named_modules(remove_duplicate=False)):
        if isinstance(part, SplitModule):
            # Its tensors come from the file: transformers, which would look for the original in it, has nothing to draw.
            owner: Any = model.get_submodule(name.rpartition(".")[0])
            owner._is_hf_initialized = True
    parts = [(name, part) for name, part in model.named_modules(remove_duplicate=False) if name in names]
    if scaled := [name for name, part in parts if isinstance(part, nn.Embedding) and any(b.is_meta for b in part.buffers())]:
        from accelerate import init_empty_weights

        with torch.device("cpu"), init_empty_weights(include_buffers=False):
            twin = type(model)(model.config)
        for name in scaled:
            set_submodule(model, name, twin.get_submodule(name))


def _as_named_in(model: Any, plan: Plan, manifest: Manifest, header: Header) -> tuple[Plan, Manifest, Header]:
    """Plan, manifest and header under the names of a model that may be another class of the same family: a base model without
    the head of what was saved, or one with a head that is new. What the model lacks is left out."""
    known, prefix = dict(model.named_modules(remove_duplicate=False)), f"{model.base_model_prefix}."

    def named(module: str) -> str | None:
        return next((n for n in (module, module.removeprefix(prefix), prefix + module) if n in known), None)

    def full(tensor: str) -> str:
        owner, _, leaf = tensor.rpartition(".")
        return f"{named(owner) or owner}.{leaf}"

    layers = {
        new: layer.model_copy(update={"tied": tuple(n for n in map(named, layer.tied) if n is not None)})
        for old, layer in plan.layers.items()
        if (new := named(old)) is not None
    }
    if not layers:
        raise CheckpointError(f"a {type(model).__name__} has none of the layers that were compressed: {list(plan.layers)[:5]}")
    shared = {full(name): full(other) for name, other in manifest.shared.items()}
    renamed = manifest.model_copy(update={"shared": shared})
    return plan.model_copy(update={"layers": layers}), renamed, {full(name): value for name, value in header.items()}


def _computing_in(plan: Plan, dtype: str) -> Plan:
    """The plan with all weights decoded to a dtype; what is stored stays as it is."""
    layers = {
        name: layer.model_copy(update={"spec": layer.spec.model_copy(update={"dtype": dtype})})
        for name, layer in plan.layers.items()
    }
    return plan.model_copy(update={"layers": layers})


def _as_stored(model: Any, header: Header, replaced: set[str]) -> None:
    """Give tensors outside networks the dtype of the file, so that transformers rounds none of them."""
    for name, tensor in list(model.state_dict(keep_vars=True).items()):
        owner, _, leaf = name.rpartition(".")
        dtype = header.get(name, (None, None))[1]
        if owner not in replaced and dtype is not None and dtype != tensor.dtype:
            module = model.get_submodule(owner)
            empty = torch.empty_like(tensor, dtype=dtype, device="meta")
            if leaf in module._parameters:
                module._parameters[leaf] = nn.Parameter(empty, requires_grad=tensor.requires_grad)
            else:
                module._buffers[leaf] = empty


def _placeholder(module: NetworkModule) -> Any:
    """Stands where a tied module will be until the tensors that it shares are loaded; holds its bias."""
    placeholder: Any = nn.Module()
    placeholder.register_parameter("bias", module._parameters["bias"])
    placeholder.stands_for = (module,)  # in a tuple, so that its tensors are not looked for in the file
    return placeholder


def _tie(model: nn.Module, name: str, first: str) -> None:
    """Put a tied module in the place of its placeholder, with the tensors of the module that it is tied to."""
    placeholder: Any = model.get_submodule(name)
    owner: Any = model.get_submodule(first)
    module = placeholder.stands_for[0].share_network(owner)
    module._parameters["bias"] = placeholder.bias
    _read_numbers(module)
    set_submodule(model, name, module)
    if hasattr(placeholder, "_hf_hook"):  # the model is spread over devices: this module runs where its numbers are
        from accelerate.hooks import AlignDevicesHook, add_hook_to_module

        device = next(iter(owner.stored().values())).device
        add_hook_to_module(module, AlignDevicesHook(execution_device=device, io_same_device=True))


def _read_numbers(module: NetworkModule) -> None:
    """What a module makes of its stored numbers once they are there."""
    if isinstance(module, TNLinear) and module._pivoted:
        module._read_pivots()
