"""Reading a compressed model from a folder that may be damaged or hostile."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tensornet_compress.errors import CheckpointError, MissingExtraError, TensorNetError
from tensornet_compress.files.hashes import check_digests, refuse_nan
from tensornet_compress.files.limits import check_config, check_size
from tensornet_compress.files.manifest import TENSORS, Manifest, check_files, read_manifest, with_permutations
from tensornet_compress.files.reading import steady
from tensornet_compress.files.shards import INDEX, open_folder
from tensornet_compress.nn import (
    NetworkModule,
    TNConv,
    TNConv2d,
    TNEmbedding,
    TNLinear,
    decode_all,
    layer_weight,
    module_kind,
    undecoded,
)
from tensornet_compress.nn.conv import conv_geometry
from tensornet_compress.nn.kinds import CONVOLUTIONS, embedding_scale
from tensornet_compress.nn.plan import LayerPlan, Plan, keep_plan
from tensornet_compress.nn.replace import set_submodule
from tensornet_compress.nn.splitting import split_for
from tensornet_compress.tensor import check_stored, expected_parts, expected_tensors

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "U8": torch.uint8}
Header = dict[str, tuple[tuple[int, ...], torch.dtype | None]]
"""Shapes and dtypes (None: one that no part of ours has) of stored tensors by name."""


def load(out_dir: str | Path, model: nn.Module | None = None, device: torch.device | str = "cpu", verify: bool = True) -> Any:
    """A compressed model from a folder written by ``save``, in eval mode.

    Args:
        out_dir: the folder.
        model: for models that are not from transformers, an uncompressed instance of the same architecture; its targeted layers
            are replaced and all of its tensors overwritten.
        device: where the tensors go.
        verify: check the hashes of all that was saved; folders of older releases have none.

    >>> import torch, tensornet_compress as tnc
    >>> model = torch.nn.Sequential(torch.nn.Linear(32, 32))
    >>> report = tnc.compress(model, tnc.Budget(bits_per_weight=8.5), allocator="energy")
    >>> again = tnc.load(tnc.save(model, "saved"), model=torch.nn.Sequential(torch.nn.Linear(32, 32)))
    >>> x = torch.randn(3, 32)
    >>> torch.equal(again(x), model(x))
    True

    Raises:
        CheckpointError: unknown version, missing or unknown tensors, wrong shapes or dtypes, NaN, damaged or truncated files.
    """
    return steady(Path(out_dir), partial(_load, model=model, device=device, verify=verify))


def _load(folder: Path, model: nn.Module | None, device: torch.device | str, verify: bool) -> nn.Module:
    manifest, plan, header = contents(folder, verify)
    with open_folder(folder) as file:
        tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in header}
    if verify:
        check_files(folder, manifest)
        if manifest.hashes:
            check_digests(tensors, manifest.hashes, repr(str(folder / (TENSORS if (folder / TENSORS).exists() else INDEX))))
    skeleton = model if model is not None else _skeleton(folder, manifest, len(header))
    split_for(skeleton, sorted(replaced_names(plan)))
    check_contents(skeleton, plan, manifest, header)
    _check_numbers(tensors, folder)
    tensors = {name: tensor.to(device) for name, tensor in tensors.items()}
    for name, module in replacements(skeleton, plan, manifest.shared, tensors).items():
        set_submodule(skeleton, name, module)
    replaced = replaced_names(plan)
    _assign(skeleton, {name: value for name, value in tensors.items() if _owner(name) not in replaced})
    shares = {name: other for name, other in manifest.shared.items() if _owner(name) not in replaced or name.endswith(".bias")}
    _share(skeleton, shares)
    keep_plan(skeleton, plan)
    return skeleton.to(device).eval()


def load_plan(out_dir: str | Path) -> Plan:
    """The plan of a saved folder, index orders included, for ``tnc.apply_plan``.

    >>> import torch, tensornet_compress as tnc
    >>> model = torch.nn.Sequential(torch.nn.Linear(32, 32))
    >>> report = tnc.compress(model, tnc.Budget(bits_per_weight=8.5), allocator="energy")
    >>> plan = tnc.load_plan(tnc.save(model, "planned"))
    >>> again = tnc.apply_plan(torch.nn.Sequential(torch.nn.Linear(32, 32)), plan)
    >>> again[0].spec.describe() == model[0].spec.describe()
    True

    Raises:
        CheckpointError: as ``load``.
    """
    return steady(Path(out_dir), lambda folder: contents(folder)[1])


def contents(folder: Path, verify: bool = True) -> tuple[Manifest, Plan, Header]:
    """What a saved folder says that it holds: its manifest, the plan with its index orders, and the header of its tensors.

    Raises:
        CheckpointError: as ``load``.
    """
    manifest = read_manifest(folder, verify)
    with open_folder(folder) as file:
        header = {name: _description(file, name) for name in file.keys()}  # noqa: SIM118 - no dict
        return manifest, _unpack_orders(manifest.plan, file, header), header


def _description(file: Any, name: str) -> tuple[tuple[int, ...], torch.dtype | None]:
    piece = file.get_slice(name)
    return tuple(piece.get_shape()), _DTYPES.get(piece.get_dtype())


def _unpack_orders(plan: Plan, file: Any, header: Collection[str]) -> Plan:
    def read(name: str) -> Tensor:
        if name not in header:
            raise CheckpointError(f"the packed order {name!r} is missing from {TENSORS}")
        tensor: Tensor = file.get_tensor(name)
        return tensor

    try:
        for name, layer in plan.layers.items():
            check_size(layer.spec, f"the plan of {name!r}")
        return with_permutations(plan, read)
    except TensorNetError as error:
        raise error if isinstance(error, CheckpointError) else CheckpointError(str(error)) from error


def _skeleton(folder: Path, manifest: Manifest, tensors: int) -> nn.Module:
    """The architecture with parameters on the meta device; buffers that no file holds are computed."""
    if manifest.architecture is None:
        raise CheckpointError(f"{str(folder)!r} holds no transformers model; pass load(..., model=an uncompressed instance)")
    try:
        import transformers
        from accelerate import init_empty_weights
    except ImportError as error:
        raise MissingExtraError(
            f"loading a transformers model needs the 'hf' extra ({error}); pip install tensornet-compress[hf]"
        ) from error
    architecture: Any = getattr(transformers, manifest.architecture, None)
    if not (isinstance(architecture, type) and issubclass(architecture, transformers.PreTrainedModel)):
        raise CheckpointError(f"{manifest.architecture!r} is not a model class of transformers {transformers.__version__}")
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{str(folder)!r} has no config.json; the folder is not whole")
    try:
        config_class: Any = architecture.config_class
        config = config_class.from_pretrained(folder)
        for name in ("quantization_config", "transformers_weights"):  # for transformers' own loading
            config.__dict__.pop(name, None)
        check_config(config, tensors, architecture)
        with init_empty_weights(include_buffers=False):
            model: Any = architecture(config)
        if (folder / "generation_config.json").is_file() and model.can_generate():
            model.generation_config = transformers.GenerationConfig.from_pretrained(folder)
    except Exception as error:  # a damaged configuration may fail anywhere in transformers, with any exception
        raise CheckpointError(
            f"{str(folder / 'config.json')!r} does not describe a {manifest.architecture}: {error}"
        ) from error
    return model


def check_contents(model: nn.Module, plan: Plan, manifest: Manifest, header: Header) -> None:
    """Names, shapes and dtypes of the file against what the model and the plan ask for, before anything is changed.

    Raises:
        CheckpointError: they do not fit.
    """
    modules, replaced = dict(model.named_modules(remove_duplicate=False)), replaced_names(plan)
    unknown = sorted(replaced - set(modules))
    if unknown:
        raise CheckpointError(f"the plan speaks of modules {unknown} that a {type(model).__name__} does not have")
    wanted: Header = {}
    for name, layer in plan.layers.items():
        for of in (name, *layer.tied):
            _check_layer(of, modules[of], layer, of != name)
        wanted |= {f"{name}.{part}": description for part, description in expected_tensors(layer.spec).items()}
    for name, tensor in model.state_dict().items():
        if _owner(name) not in replaced or name.rpartition(".")[2] == "bias":
            wanted[name] = (tuple(tensor.shape), tensor.dtype if tensor.is_floating_point() else None)
    for name, other in manifest.shared.items():
        own = _owner(name) not in replaced or name.endswith(".bias")
        if own and (name not in wanted or other not in wanted or other in manifest.shared):
            raise CheckpointError(f"the manifest says that {name!r} is shared with {other!r}, which the model does not have so")
    for name in manifest.shared:
        wanted.pop(name, None)
    missing, extra = sorted(set(wanted) - set(header)), sorted(set(header) - set(wanted))
    if missing or extra:
        raise CheckpointError(f"{TENSORS} does not fit the model: missing {missing[:5]}, unknown {extra[:5]}")
    for name, (shape, expected) in wanted.items():
        found_shape, found_dtype = header[name]
        if found_shape != shape:
            raise CheckpointError(f"tensor {name!r} has shape {found_shape}, expected {shape}")
        if expected is not None and not _same_kind(found_dtype, expected):
            raise CheckpointError(f"tensor {name!r} is stored as {found_dtype}, expected {expected}")
    total = sum(prod(shape) * (dtype.itemsize if dtype is not None else 8) for shape, dtype in header.values())
    if all(dtype is not None for _, dtype in header.values()) and total != manifest.nbytes:
        raise CheckpointError(f"{TENSORS} holds {total:,} bytes of tensors, the manifest says {manifest.nbytes:,}")


def _check_layer(name: str, module: Any, layer: LayerPlan, tied: bool) -> None:
    """A layer of the plan against the module that it is to replace."""
    if isinstance(module, NetworkModule):
        raise CheckpointError(f"the model's {name!r} is a network already; pass an uncompressed instance")
    kind, weight = module_kind(module), layer_weight(module)
    if kind is None:
        raise CheckpointError(
            f"what {name!r}, a {type(module).__name__}, computes cannot be told before it is loaded; use tnc.load(folder)"
        )
    if tuple(weight.shape) != layer.spec.shape or (not tied and kind != layer.kind):
        raise CheckpointError(
            f"the plan makes {name!r} a {layer.kind} of shape {layer.spec.shape}, it is a {kind} of shape {tuple(weight.shape)}"
        )
    if kind in CONVOLUTIONS and layer.geometry is not None and _plain(conv_geometry(module)) != _plain(layer.geometry):
        raise CheckpointError(f"the plan gives {name!r} the geometry {layer.geometry}, the model has {conv_geometry(module)}")
    if not tied and getattr(module, "padding_idx", None) != layer.padding_idx:
        raise CheckpointError(f"the plan gives {name!r} padding_idx {layer.padding_idx}, the model does not")


def _plain(geometry: Mapping[str, Any]) -> dict[str, Any]:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in geometry.items()}


def _check_numbers(tensors: Mapping[str, Tensor], folder: Path) -> None:
    try:
        for name, tensor in tensors.items():
            refuse_nan(name, tensor)
    except TensorNetError as error:
        raise CheckpointError(f"{str(folder / TENSORS)!r}: {error}") from error


def _same_kind(found: torch.dtype | None, expected: torch.dtype) -> bool:
    """Equal, or both floating point: a model cast to another dtype may be saved as it is."""
    return found == expected or (found is not None and found.is_floating_point and expected.is_floating_point)


def replaced_names(plan: Plan) -> set[str]:
    """Modules that the plan replaces."""
    return {name for first, layer in plan.layers.items() for name in (first, *layer.tied)}


def _owner(name: str) -> str:
    """The module that a tensor belongs to."""
    return name.rpartition(".")[0]


def replacements(
    model: nn.Module, plan: Plan, shared: Mapping[str, str], tensors: Mapping[str, Tensor]
) -> dict[str, NetworkModule]:
    """The network modules of a plan by name, those that are tied included.

    Raises:
        CheckpointError: tensors (those on the meta device aside) do not hold what their format means.
    """
    made: dict[str, NetworkModule] = {}
    for name, layer in plan.layers.items():
        stored = {part: tensors[shared.get(f"{name}.{part}", f"{name}.{part}")] for part in expected_parts(layer.spec)}
        try:
            check_stored(layer.spec, stored)
            bias = tensors.get(shared.get(f"{name}.bias", f"{name}.bias"))
            original = model.get_submodule(name)
            with undecoded():
                made[name] = _network_module(layer, stored, bias, original).stand_for(original)
        except (TensorNetError, RuntimeError, ValueError, TypeError, KeyError) as error:
            raise CheckpointError(f"the tensors of {name!r} are damaged: {error}") from error
    decode_all(made)
    for name, layer in plan.layers.items():
        owner = made[name]
        for other in layer.tied:
            original = model.get_submodule(other)
            if isinstance(original, nn.Embedding):
                scale = _scale(original, layer)
                tied: NetworkModule = TNEmbedding(layer.spec, owner.stored(), original.padding_idx, scale)
            else:
                bias, conv1d = tensors.get(shared.get(f"{other}.bias", f"{other}.bias")), module_kind(original) == "conv1d"
                tied = TNLinear(layer.spec, owner.stored(), bias, conv1d)
            made[other] = tied.stand_for(original).share_network(owner)
    return made


def _network_module(layer: LayerPlan, stored: dict[str, Tensor], bias: Tensor | None, original: nn.Module) -> NetworkModule:
    if layer.kind == "embedding":
        return TNEmbedding(layer.spec, stored, layer.padding_idx, _scale(original, layer))
    if layer.kind in CONVOLUTIONS:
        made = TNConv2d if layer.kind == "conv2d" else TNConv
        return made(layer.spec, layer.geometry or {}, stored, bias)
    return TNLinear(layer.spec, stored, bias, layer.kind == "conv1d")


def _scale(original: nn.Module, layer: LayerPlan) -> float:
    """What the instance that a folder is loaded into multiplies its embeddings with."""
    scale = embedding_scale(original, getattr(torch, layer.spec.dtype))
    if scale is None:
        raise CheckpointError(f"the plan speaks of an embedding where the model has a {type(original).__name__}")
    return scale


def _assign(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        module, leaf = model.get_submodule(_owner(name)), name.rpartition(".")[2]
        if leaf in module._parameters:
            module._parameters[leaf] = nn.Parameter(tensor, requires_grad=tensor.is_floating_point())
        else:
            module._buffers[leaf] = tensor


def _share(model: nn.Module, shared: Mapping[str, str]) -> None:
    for name, other in shared.items():
        leaf, source_leaf = name.rpartition(".")[2], other.rpartition(".")[2]
        source = model.get_submodule(_owner(other))
        registry = "_parameters" if source_leaf in source._parameters else "_buffers"
        getattr(model.get_submodule(_owner(name)), registry)[leaf] = getattr(source, registry)[source_leaf]
