"""Writing a compressed model to a folder."""

from __future__ import annotations

import json
import os
import tempfile
from collections import Counter
from copy import deepcopy
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from tensornet_compress.errors import CheckpointError
from tensornet_compress.files.hashes import digests, file_digest, sealed
from tensornet_compress.files.manifest import (
    FORMAT_VERSION,
    MANIFEST,
    NEEDS_US,
    QUANT_METHOD,
    LayerEntry,
    Manifest,
    read_manifest,
    without_permutations,
)
from tensornet_compress.files.shards import INDEX, LARGEST, write_shards, written_before
from tensornet_compress.files.whole import check_folder, locked, whole_folder
from tensornet_compress.nn import NetworkModule, identity
from tensornet_compress.nn.plan import PLAN_ATTRIBUTE, Plan
from tensornet_compress.version import __version__


class LayersReport(Protocol):
    """What ``save`` reads of a report of ``compress``: bytes before, each layer's family, sizes and error, and the name of
    the original on the hub."""

    original_nbytes: int
    layers: Any
    source: str


def save(
    model: nn.Module,
    out_dir: str | Path,
    tokenizer: Any = None,
    report: LayersReport | None = None,
    overwrite: bool = False,
    keep: bool = False,
    max_shard_nbytes: int = LARGEST,
) -> Path:
    """Write a compressed model: ``model.safetensors``, ``tensornet.json``, and for transformers models their configuration.

    The folder appears whole or not at all. ``report`` adds per-layer errors for ``inspect``. ``overwrite`` replaces what an
    earlier save wrote; all other files in ``out_dir``, a cache's profile too, stay. ``keep`` writes into any folder that may be
    there already and leaves its other files, as ``save_pretrained`` does; each file then appears whole. Tensors of more than
    ``max_shard_nbytes`` go to several files, which ``model.safetensors.index.json`` names.

    >>> import torch, tensornet_compress as tnc
    >>> model = torch.nn.Sequential(torch.nn.Linear(32, 32))
    >>> report = tnc.compress(model, tnc.Budget(bits_per_weight=8.5), allocator="energy")
    >>> folder = tnc.save(model, "saved", report=report)
    >>> sorted(path.name for path in folder.iterdir())
    ['model.safetensors', 'tensornet.json']

    Raises:
        CheckpointError: the model was not compressed, or ``out_dir`` exists and ``overwrite`` is false.
    """
    if keep:
        target = Path(out_dir)
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as near:
            made = save(model, Path(near) / "saved", tokenizer, report, max_shard_nbytes=max_shard_nbytes)
            target.mkdir(exist_ok=True)
            for file in (moved := list(made.iterdir())):
                os.replace(file, target / file.name)
            for name in written_before(target) - {file.name for file in moved}:
                (target / name).unlink(missing_ok=True)
        return target
    plan = getattr(model, PLAN_ATTRIBUTE, None)
    if not isinstance(plan, Plan):
        raise CheckpointError(f"this {type(model).__name__} holds no plan; call tnc.compress on it before tnc.save")
    tensors, shared = unique_tensors(model)
    _check_plan(model, plan)
    for name in plan.layers:
        network = model.get_submodule(name).network()  # type: ignore[operator]
        tensors |= {f"{name}.{key}": value for key, value in network.stored_tensors().items() if "order" in key}
    config = getattr(model, "config", None)
    is_transformers = hasattr(config, "save_pretrained")
    nbytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    with locked(out_dir):
        replaced = check_place(out_dir, overwrite, nbytes)
        with whole_folder(out_dir, replaced) as folder:
            write_shards(folder, tensors, max_shard_nbytes)
            if is_transformers:
                _write_config(model, plan, folder / "config.json")
                generation = getattr(model, "generation_config", None)
                if generation is not None:
                    generation.save_pretrained(folder)
            if tokenizer is not None:
                tokenizer.save_pretrained(folder)
            manifest = Manifest(
                source="" if report is None else report.source,
                tool=f"tensornet_compress {__version__}",
                architecture=type(model).__name__ if is_transformers else None,
                nbytes=nbytes,
                original_nbytes=None if report is None else report.original_nbytes,
                shared=shared,
                plan=without_permutations(plan),
                layers={} if report is None else {layer.name: _layer_entry(layer) for layer in report.layers},
                hashes=digests(tensors),
                files={path.name: file_digest(path) for path in sorted(folder.iterdir()) if path.suffix != ".safetensors"},
            )
            text = manifest.model_dump_json(exclude=None if manifest.source else {"source"})
            (folder / MANIFEST).write_text(sealed(text), encoding="utf-8")
    return Path(out_dir)


def computing_dtype(model: nn.Module, plan: Plan) -> str:
    """The dtype that most of a compressed model's dense numbers have; where there are none, that its layers had."""
    networks = {module for module in model.modules() if isinstance(module, NetworkModule)}
    counts: Counter[str] = Counter({layer.spec.dtype: 0 for layer in plan.layers.values()})
    for module in model.modules():
        if module in networks:
            continue
        for parameter in module.parameters(recurse=False):
            if parameter.is_floating_point():
                counts[str(parameter.dtype).removeprefix("torch.")] += parameter.numel()
    return counts.most_common(1)[0][0]


def _write_config(model: nn.Module, plan: Plan, file: Path) -> None:
    """A transformers model's configuration, which says how the folder is to be loaded and in what dtype it computes."""
    dtype = computing_dtype(model, plan)
    config: Any = deepcopy(model.config)
    config.architectures, config.dtype = [type(model).__name__], dtype
    config.quantization_config = {"quant_method": QUANT_METHOD, "format_version": FORMAT_VERSION, "dtype": dtype}
    if (file.parent / INDEX).exists():
        config.quantization_config["weights"] = INDEX
    config.save_pretrained(file.parent)
    # Of this entry transformers keeps what it reads but writes nothing.
    content = json.loads(file.read_text(encoding="utf-8")) | {"transformers_weights": NEEDS_US}
    file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def unique_tensors(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors to store, each once and on the CPU, and name -> name of the one it is shared with."""
    first: dict[tuple[Any, ...], str] = {}
    tensors: dict[str, Tensor] = {}
    shared: dict[str, str] = {}
    for name, tensor in model.state_dict().items():
        key = identity(tensor)
        if tensor.numel() and key in first:
            shared[name] = first[key]
            continue
        first[key] = name
        tensors[name] = tensor.detach().cpu()
    return tensors, shared


def check_place(out_dir: str | Path, overwrite: bool, nbytes: int = 0) -> set[str]:
    """Refuse to write over what was not written by ``save``, without being asked to, or where ``nbytes`` find no room; gives
    the names of the files in ``out_dir`` that an earlier save and the command's report left there.

    Raises:
        TensorNetError: the folder cannot be written; the message says why.
    """
    target = Path(out_dir)
    check_folder(target, nbytes)
    if not target.exists():
        return set()
    if not overwrite:
        raise CheckpointError(f"{str(target)!r} exists; choose another folder, or pass overwrite (--overwrite)")
    if not any(target.iterdir()):
        return set()
    if not (target / MANIFEST).is_file():
        raise CheckpointError(f"{str(target)!r} holds files but no {MANIFEST}: it was not written by this tool and is kept")
    try:
        known = set(read_manifest(target).files)
    except CheckpointError:  # A damaged folder may be replaced too; of what else is in it nothing is known.
        known = set()
    return known | {MANIFEST, *written_before(target), "report.json", "report.html"}


def _check_plan(model: nn.Module, plan: Plan) -> None:
    planned = set(plan.layers).union(*(layer.tied for layer in plan.layers.values()))
    networks = (name for name, module in model.named_modules() if isinstance(module, NetworkModule))
    unplanned = [name for name in networks if name not in planned]
    if unplanned:
        raise CheckpointError(
            f"modules {unplanned[:5]} are networks that the model's plan does not speak of; compress all layers in one call"
        )
    for name in plan.layers:
        module = model.get_submodule(name)
        if getattr(module, "spec", None) != plan.layers[name].spec:
            raise CheckpointError(f"the model's module {name!r} no longer is the network of its plan; compress it again")


def _layer_entry(layer: Any) -> LayerEntry:
    return LayerEntry(**{name: getattr(layer, name) for name in LayerEntry.model_fields})
