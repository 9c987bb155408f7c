"""The JSON side of a saved folder, and the index orders that travel beside it as packed tensors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

from pydantic import Field
from torch import Tensor

from tensornet_compress.coding import unpack_permutation
from tensornet_compress.errors import CheckpointError, TensorNetError
from tensornet_compress.files.hashes import check_seal, file_digest
from tensornet_compress.files.limits import LONGEST_ORDER
from tensornet_compress.files.reading import LARGEST_JSON, parse_json, read_text
from tensornet_compress.frozen import Frozen
from tensornet_compress.nn.plan import Plan
from tensornet_compress.tensor import FibreOrder, NetworkSpec, TermSpec
from tensornet_compress.tensor.network import order_name

MANIFEST = "tensornet.json"
TENSORS = "model.safetensors"
FORMAT_VERSION = 1
QUANT_METHOD = "tensornet"
"""What ``quant_method`` says in the ``quantization_config`` of a saved folder's ``config.json``."""
NEEDS_US = (
    "none without the package tensornet_compress, which wrote this model; pip install 'tensornet-compress[hf]', then "
    "'import tensornet_compress' before from_pretrained"
)
"""Where ``config.json`` names the file of weights: transformers refuses it with an error that quotes it, where it would
otherwise make a model of random numbers of a folder whose quantisation it does not know."""


class LayerEntry(Frozen):
    """What a report said of a layer: its family, sizes and squared relative error in the metric."""

    family: str | None = None
    weights: int
    nbytes: int
    original_nbytes: int
    error: float | None = None


class Manifest(Frozen):
    """What a reader needs beside the tensors.

    ``architecture``: class name in transformers, None for other models. ``shared``: tensor names that are one with another
    tensor in the file. ``nbytes``: bytes of all stored tensors. Packed fibre orders lie with the tensors; the plan in the
    manifest holds them as empty permutations. ``hashes`` of tensors, of ``files`` and of the manifest itself (``checksum``)
    are missing in folders of older releases. ``source``: hub id and commit that the original came from, if it did.
    """

    format_version: Literal[1] = 1
    checksum: str = ""
    source: str = ""
    tool: str
    architecture: str | None
    nbytes: int = Field(ge=0)
    original_nbytes: int | None = Field(default=None, ge=0)
    shared: dict[str, str]
    plan: Plan
    layers: dict[str, LayerEntry] = Field(default_factory=dict)
    hashes: dict[str, str] = Field(default_factory=dict)
    files: dict[str, str] = Field(default_factory=dict)


def read_manifest(folder: str | Path, verify: bool = True) -> Manifest:
    """Read and validate the manifest of a saved folder, and check its own hash unless ``verify`` is false.

    Raises:
        CheckpointError: no manifest, a version that this release does not know, or damaged JSON.
    """
    path = Path(folder) / MANIFEST
    if not path.exists():
        why = f"it has no {MANIFEST}, which weights or tnc.save writes" if path.parent.exists() else "it does not exist"
        raise CheckpointError(f"{str(folder)!r} is not a saved folder: {why}")
    text, where = read_text(path, LARGEST_JSON), repr(str(path))
    data = parse_json(text, where)
    version = data.get("format_version") if isinstance(data, dict) else None
    if version != FORMAT_VERSION:
        raise CheckpointError(f"{where} has format version {version!r}, this release reads {FORMAT_VERSION}")
    if verify and ("checksum" in data or data.get("hashes")):
        check_seal(text, where)
    try:
        return Manifest.from_json(text)
    except TensorNetError as error:
        raise CheckpointError(f"{where}: {error}") from error


_READ_BESIDE = (
    "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model", "chat_template.jinja", "chat_template.json",
    "preprocessor_config.json", "processor_config.json",
)  # fmt: skip
"""What transformers reads when it lies in a model's folder; all but the first belong to tokenizers and processors, which may
be added to a model that was saved without."""


def check_files(folder: Path, manifest: Manifest) -> None:
    """Raises CheckpointError unless the small files of a folder (configuration, tokenizer) are those that were saved."""
    strange = [name for name in _READ_BESIDE if name not in manifest.files and (folder / name).exists()]
    if strange and not manifest.files.keys().isdisjoint(_READ_BESIDE[1:]):
        raise CheckpointError(
            f"{str(folder / strange[0])!r} was not saved with the model, and would be read with it; put it elsewhere; if it is "
            "yours, load the model with verify=False and save it again"
        )
    for name, digest in manifest.files.items():
        if Path(name).name != name or not (folder / name).is_file():
            raise CheckpointError(f"{str(folder)!r} lacks {name!r}, which was saved with it; get a whole copy of the folder")
        if file_digest(folder / name) != digest:
            raise CheckpointError(
                f"{str(folder / name)!r} is not the file that was saved; put that one back; if the change is yours, "
                "load the model with verify=False and save it again"
            )


def without_permutations(plan: Plan) -> Plan:
    """The plan with stored permutations left out."""
    return _map_specs(plan, lambda _name, spec: spec_without_permutations(spec))


def with_permutations(plan: Plan, read: Callable[[str], Tensor]) -> Plan:
    """The plan with permutations unpacked from tensors; ``read`` gives a tensor by its full name."""
    return _map_specs(plan, lambda name, spec: spec_with_permutations(spec, lambda order: read(f"{name}.{order}")))


def spec_without_permutations(spec: NetworkSpec) -> NetworkSpec:
    """The spec with stored permutations left out."""
    return _map_orders(spec, lambda _number, _term, order: order.model_copy(update={"permutation": ()}))


def spec_with_permutations(spec: NetworkSpec, read: Callable[[str], Tensor]) -> NetworkSpec:
    """The spec with permutations unpacked from tensors; ``read`` gives a tensor by its name in the network."""

    def unpack(number: int, term: TermSpec, order: FibreOrder) -> FibreOrder:
        if (length := term.layout.shape[order.axis]) > LONGEST_ORDER:
            raise TensorNetError(f"an order of {length:,} fibres is longer than the {LONGEST_ORDER:,} that files may hold")
        packed = read(order_name(number, order.axis))
        return order.model_copy(update={"permutation": unpack_permutation(packed, term.layout.shape[order.axis])})

    return _map_orders(spec, unpack)


def _map_specs(plan: Plan, change: Callable[[str, NetworkSpec], NetworkSpec]) -> Plan:
    layers = {name: layer.model_copy(update={"spec": change(name, layer.spec)}) for name, layer in plan.layers.items()}
    return plan.model_copy(update={"layers": layers})


def _map_orders(spec: NetworkSpec, change: Callable[[int, TermSpec, FibreOrder], FibreOrder]) -> NetworkSpec:
    terms = []
    for number, term in enumerate(spec.terms):
        orders = tuple(o if o.absorbed else change(number, term, o) for o in term.layout.fibre_orders)
        terms.append(term.model_copy(update={"layout": term.layout.model_copy(update={"fibre_orders": orders})}))
    return spec.model_copy(update={"terms": tuple(terms)})
