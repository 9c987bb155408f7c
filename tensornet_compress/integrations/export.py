"""A saved folder written in a format of others, with the bytes that it takes there and what the conversion loses."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from tensornet_compress.coding import FloatFormat, IntFormat, parse_format
from tensornet_compress.coding.floats import FLOAT_DTYPES
from tensornet_compress.errors import CheckpointError, TensorNetError
from tensornet_compress.files import MANIFEST, TENSORS, load, read_manifest
from tensornet_compress.files.save import computing_dtype, unique_tensors
from tensornet_compress.files.whole import whole_file, whole_folder, write_tensors
from tensornet_compress.frozen import Frozen
from tensornet_compress.integrations import compressed_tensors, gguf_file
from tensornet_compress.integrations.compressed_tensors import Scheme, bits_of
from tensornet_compress.integrations.grids import Grid, grid_of
from tensornet_compress.nn import computed_weights, materialize
from tensornet_compress.tensor import NetworkSpec, TensorNetwork
from tensornet_compress.tensor.spec import DTYPES

ExportFormat = Literal["compressed-tensors", "gguf", "dense"]
# Files of a saved folder that are about its own tensors.
_OURS = {MANIFEST, TENSORS, "config.json", "generation_config.json", "report.json", "report.html"}


class ExportedLayer(Frozen):
    """A layer that was a network: how it is stored now, its bytes, and the relative error of the conversion (0: none)."""

    name: str
    stored_as: str
    nbytes: int
    error: float


class ExportReport(Frozen):
    """What ``export`` wrote. ``nbytes``: tensors of the whole model; ``source_nbytes``: those of the saved folder; ``error``:
    of all layers that were networks together, relative to their norm."""

    to: ExportFormat
    path: str
    nbytes: int
    source_nbytes: int
    error: float
    layers: tuple[ExportedLayer, ...]
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        exact = sum(layer.error == 0 for layer in self.layers)
        lines = [
            f"{self.to}: {self.nbytes:,} bytes of tensors in {self.path!r}, {self.source_nbytes:,} before; {exact} of "
            f"{len(self.layers)} layers exact, relative error of all {self.error:.3g}"
        ]
        if not exact and self.to != "dense":
            lines.append(
                "  every layer was rounded again; layers that method='dense' stores in formats of the target "
                f"(formats={self.to!r}) are exported without loss"
            )
        return "\n".join([*lines, *(f"  {note}" for note in self.notes)])


def export(
    folder: str | Path,
    target: str | Path,
    to: ExportFormat = "compressed-tensors",
    *,
    dtype: str | None = None,
    nearest: str | None = None,
    fuse: bool = True,
    bits: Sequence[int] = (4, 8),
    overwrite: bool = False,
) -> ExportReport:
    """Write a transformers model of a saved folder for readers that do not know this package.

    Args:
        folder: written by ``save``.
        target: the folder to write; for ``gguf`` the file.
        to: ``compressed-tensors``: layers in packed integers stay so, without loss, on symmetric grids, all others become
            dense; read by transformers and vLLM. ``gguf``: integer layers in blocks of 32, exact where a block type holds their
            grid; read by llama.cpp. ``dense``: a plain folder.
        dtype: of dense weights: float32, bfloat16 or float16; by default that of the model.
        nearest: a number format (``int8g32``, ``int4g64z``, ...) to round those linear layers to that have no exact form in the
            target; by default they become dense, or in ``gguf`` ``int8g32``, unless ``dtype`` is given: then they are dense in
            it, and llama.cpp does not round their inputs either.
        fuse: for ``compressed-tensors``, let queries, keys and values, and gate and up projections, be of one scheme, as vLLM
            demands. Where some of them have none, all become dense.
        bits: for ``compressed-tensors``, the numbers of bits that codes may have. vLLM has kernels for 4 and 8; transformers
            reads all from 2 to 8. Integers with zero points take one bit more than they have.
        overwrite: replace what is at ``target``.

    >>> import tensornet_compress as tnc
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 64}
    >>> model = LlamaForCausalLM(LlamaConfig(**sizes))
    >>> report = tnc.compress(model, tnc.Budget(bits_per_weight=6.0), allocator="energy", formats="gguf")
    >>> tnc.export(tnc.save(model, "saved"), "model.gguf", to="gguf").error < 1e-7
    True

    Raises:
        CheckpointError: ``folder`` holds no transformers model, or ``target`` exists.
        TensorNetError: an unknown format, dtype or number of bits, an architecture that ``gguf`` is not written for.
        MissingExtraError: ``gguf`` without the package of that name.
    """
    if to not in get_args(ExportFormat):
        raise TensorNetError(f"unknown target {to!r}; export to one of {', '.join(get_args(ExportFormat))}")
    if dtype is not None and (dtype not in DTYPES or dtype == "float64"):
        raise TensorNetError(f"unknown dtype {dtype!r}; choose float32, bfloat16 or float16")
    if nearest is not None and (to == "dense" or not isinstance(parse_format(nearest), IntFormat)):
        raise TensorNetError(f"nearest={nearest!r} must be an integer format such as int8g32, and serves integer targets only")
    if not bits or not set(bits) <= set(range(2, 9)):
        raise TensorNetError(f"bits={tuple(bits)} must be some of 2 to 8")
    source, place = Path(folder), Path(target)
    if read_manifest(source).architecture is None:
        raise CheckpointError(f"{str(folder)!r} holds no transformers model, and other formats hold only those")
    if place.exists() and not overwrite:
        raise CheckpointError(f"{str(target)!r} exists; choose another place, or pass overwrite (--overwrite)")
    if place.is_dir() and (place.samefile(source) or (any(place.iterdir()) and not (place / "config.json").is_file())):
        raise CheckpointError(f"{str(target)!r} is the source, or holds files but no model: it is kept; choose another place")
    if source.resolve() in place.resolve().parents:
        raise CheckpointError(f"{str(target)!r} lies in the model {str(folder)!r}, whose files are kept; choose another place")
    source_model = _Source(source, None if dtype is None else DTYPES[dtype])
    if to == "gguf":
        return _to_gguf(source_model, place, nearest or ("int8g32" if dtype is None else None))
    return _to_folder(source_model, place, to, nearest, fuse, bits)


class _Source:
    """A saved model, and what becomes of its networks.

    ``networks``: by name, each once. ``tensors``: the dense model's, each once. ``dtype``: of dense weights.
    """

    def __init__(self, folder: Path, dtype: torch.dtype | None):
        self.folder, self.model = folder, load(folder)
        plan = self.model.tensornet_plan
        self.dtype = dtype or DTYPES[computing_dtype(self.model, plan)]
        self.networks: dict[str, TensorNetwork] = {name: self.model.get_submodule(name).network() for name in plan.layers}
        self.nbytes = _nbytes(unique_tensors(self.model)[0])
        materialize(self.model)
        if found := computed_weights(self.model):
            raise CheckpointError(
                f"{found[0]!r} computed its weight from other parameters (weight_norm), which an export does not hold"
            )
        self.tensors, shared = unique_tensors(self.model)
        tied = getattr(self.model, "all_tied_weights_keys", {})  # what readers tie by themselves
        self.tensors |= {key: self.tensors[first] for key, first in shared.items() if not {key, first} & {*tied}}
        # Not transformers' Conv1D, and not a head that is one with an embedding.
        self.linear = [name for name, module in self.model.named_modules() if isinstance(module, nn.Linear)]
        self.grids = {name: grid for name in self.linear if name in self.networks and (grid := grid_of(self.networks[name]))}
        self._layers: list[ExportedLayer] = []
        self._lost = self._whole = 0.0

    def replaced(self, tensor: str) -> str | None:
        """The network whose dense weight a tensor is."""
        owner, _, leaf = tensor.rpartition(".")
        return owner if leaf == "weight" and owner in self.networks else None

    def tell(self, name: str, stored_as: str, parts: Mapping[str, Tensor], reference: Tensor, read: Tensor) -> None:
        """Note how a network is stored now, and what a reader makes of it beside what it was."""
        lost = (read.float() - reference.float()).square().sum(dtype=torch.float64).item()
        whole = reference.float().square().sum(dtype=torch.float64).item()
        self._lost, self._whole = self._lost + lost, self._whole + whole
        error = (lost / max(whole, 1e-300)) ** 0.5
        self._layers.append(ExportedLayer(name=name, stored_as=stored_as, nbytes=_nbytes(parts), error=error))

    def report(self, to: ExportFormat, place: Path, stored: Mapping[str, Tensor], notes: Sequence[str]) -> ExportReport:
        """The report, once all is told."""
        return ExportReport(
            to=to,
            path=str(place),
            nbytes=_nbytes(stored),
            source_nbytes=self.nbytes,
            error=(self._lost / max(self._whole, 1e-300)) ** 0.5,
            layers=tuple(self._layers),
            notes=tuple(notes),
        )


def _to_folder(
    source: _Source, place: Path, to: ExportFormat, nearest: str | None, fuse: bool, bits: Sequence[int]
) -> ExportReport:
    grids, notes = ({}, []) if to == "dense" else _grids_of_schemes(source, nearest, fuse, max(bits))
    joined = compressed_tensors.fused(grids) if fuse else [[name] for name in grids]
    schemes = {name: Scheme.holding([grids[n] for n in names], bits) for names in joined for name in names}
    stored: dict[str, Tensor] = {}
    for key, tensor in source.tensors.items():
        name = source.replaced(key)
        if name in schemes:
            parts = schemes[name].parts(grids[name])
            stored |= {f"{name}.{part}": value for part, value in parts.items()}
            # Readers multiply in the dtype of the model, to which they cast the scales.
            read = grids[name].to_dense(source.dtype)
            source.tell(name, f"int{schemes[name].bits}", parts, source.networks[name].to_dense(), read)
            continue
        network = None if name is None else source.networks[name]
        kept = source.dtype if network is None or to == "dense" else _narrowest(network, source.dtype)
        stored[key] = tensor.to(kept) if tensor.is_floating_point() else tensor
        if name is not None and network is not None:
            source.tell(name, str(kept).removeprefix("torch."), {"": stored[key]}, network.to_dense(), stored[key])
    config, generation = source.model.config, getattr(source.model, "generation_config", None)
    config.architectures, config.dtype = [type(source.model).__name__], str(source.dtype).removeprefix("torch.")
    if schemes:
        config.quantization_config = compressed_tensors.configuration(schemes)
    with whole_folder(place) as made:
        write_tensors(made / TENSORS, stored, {"format": "pt"})
        config.save_pretrained(made)
        if generation is not None:
            generation.save_pretrained(made)
        for file in source.folder.iterdir():
            if file.is_file() and file.name not in _OURS:
                shutil.copyfile(file, made / file.name)
    return source.report(to, place, stored, notes)


def _grids_of_schemes(source: _Source, nearest: str | None, fuse: bool, most: int) -> tuple[dict[str, Grid], list[str]]:
    """The layers that stay integers, and what is to be said of those that do not."""
    grids = {name: grid for name, grid in source.grids.items() if grid.offset is None and bits_of(grid) <= most}
    if nearest is not None:
        for name in source.linear:
            if name in source.networks and name not in grids:
                rounded = _rounded(source.networks[name].to_dense(torch.float32), nearest)
                grids |= {name: rounded} if rounded is not None and bits_of(rounded) <= most else {}
    if not fuse:
        return grids, []
    mixed = [n for names in compressed_tensors.fused(source.linear) if set(names) - set(grids) for n in names if n in grids]
    told = f"{len(mixed)} layers in integers became dense, as some that vLLM joins them with are none; fuse=False keeps them"
    notes = [told] if mixed else []
    return {name: grid for name, grid in grids.items() if name not in mixed}, notes


def _to_gguf(source: _Source, place: Path, nearest: str | None) -> ExportReport:
    gguf_file.check_architecture(source.model.config)
    blocks: dict[str, gguf_file.Stored] = {}
    for key, tensor in source.tensors.items():
        name = source.replaced(key)
        if name is None:
            blocks[key] = gguf_file.in_floats(tensor.to(source.dtype))
            continue
        network = source.networks[name]
        reference, grid = network.to_dense(torch.float32), grid_of(network)
        made = None if grid is None else gguf_file.in_blocks(grid)
        floats = network.spec.is_dense and isinstance(network.spec.terms[0].formats[0], FloatFormat)
        if made is None and not floats and nearest is not None and (rounded := _rounded(reference, nearest)) is not None:
            made = gguf_file.in_blocks(rounded)
        blocks[key] = made or gguf_file.in_floats(tensor.to(_narrowest(network, source.dtype)))
        source.tell(name, blocks[key].kind, {"": blocks[key].data}, reference, blocks[key].to_dense())
    with whole_file(place) as file:
        notes = gguf_file.write(file, source.model.config, source.folder, blocks)
    return source.report("gguf", place, {key: block.data for key, block in blocks.items()}, notes)


def _rounded(dense: Tensor, name: str) -> Grid | None:
    """A matrix rounded to the nearest numbers of an integer format; None where its rows are shorter than a group."""
    spec = NetworkSpec.dense(tuple(dense.shape), parse_format(name))
    return grid_of(TensorNetwork.from_cores(spec, [[dense]]))


def _narrowest(network: TensorNetwork, dtype: torch.dtype) -> torch.dtype:
    """The dtype of a dense floating-point network where all of its numbers are numbers of ``dtype`` too, else ``dtype``."""
    fmt = network.spec.terms[0].formats[0]
    if not network.spec.is_dense or not isinstance(fmt, FloatFormat):
        return dtype
    own = FLOAT_DTYPES[fmt.dtype]
    return own if torch.promote_types(own, dtype) == dtype else dtype


def _nbytes(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
