"""Caches as files, for prefix reuse and multi-turn: one safetensors file with a JSON description in its header."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from tensornet_compress.coding.planes import WIDTHS, Planes
from tensornet_compress.errors import CheckpointError, TensorNetError
from tensornet_compress.files.whole import whole_file
from tensornet_compress.frozen import Frozen
from tensornet_compress.kv.cache import CompressedCache
from tensornet_compress.kv.live.cache import LiveCache
from tensornet_compress.kv.payload import Payload
from tensornet_compress.kv.profile.profile import Profile
from tensornet_compress.kv.rope import Rotary
from tensornet_compress.kv.storage.blocks import Block, Sequence
from tensornet_compress.kv.storage.cache import StorageCache

VERSION = 1
_ON_DEVICE = ("tail", "other", "codes", "sink")
"""First letters of the names of what layers hold."""
_KEY = "tensornet_compress_kv"


class BlockRecord(Frozen):
    """A block in the file; ``payload`` and ``rotary`` number the stored ones."""

    start: int
    length: int
    skipped: int
    position: int | None
    payload: int
    tokens: int
    rotary: int | None


class CacheRecord(Frozen):
    """Everything of a saved cache that is not a tensor."""

    version: int = VERSION
    mode: Literal["live", "storage"]
    bits: float | None
    sinks: int
    window: int
    block: int
    profile: str | None
    sealed: list[int]
    first: list[int]
    rotary_style: list[str]
    blocks: list[list[BlockRecord]]
    other: dict[int, int | None]


def fingerprint(profile: Profile | None) -> str | None:
    """Hash of a profile's tensors: a cache file only opens with the profile it was coded with."""
    if profile is None:
        return None
    digest = hashlib.sha256()
    for name, tensor in sorted(profile.tensors().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def save_cache(cache: CompressedCache, path: str | Path) -> int:
    """Write a cache to one file, whole or not at all; returns the bytes of the file. A storage cache is written frozen.

    Raises:
        TensorNetError: the cache is empty, has a codec of its own, or holds layers that cannot be saved.
    """
    tensors: dict[str, Tensor] = {}
    if not cache.compressed_layers[0].is_initialized:
        raise TensorNetError("the cache is empty; there is nothing to save")
    other = _other_tensors(cache, tensors)
    if isinstance(cache, StorageCache):
        record = _storage_record(cache, tensors, other)
    elif isinstance(cache, LiveCache):
        record = _live_record(cache, tensors, other)
    else:
        raise TensorNetError(f"a {type(cache).__name__} cannot be saved")
    if cache.positions is not None:
        tensors["positions"] = cache.positions
    with whole_file(path) as file:
        save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, file, {_KEY: record.to_json()})
    return Path(path).stat().st_size


def load_cache(path: str | Path, model: nn.Module, profile: Profile | None = None) -> CompressedCache:
    """Read a cache written by ``save_cache``, ready for ``past_key_values`` of the same model.

    Raises:
        CheckpointError: the file is missing, damaged, of another version, or needs another profile or model.
    """
    try:
        with safe_open(path, "pt") as file:
            header = (file.metadata() or {}).get(_KEY)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if header is None:
            raise CheckpointError(f"{str(path)!r} is a safetensors file, but not of a cache")
        record = CacheRecord.from_json(header)
    except (OSError, SafetensorError, ValidationError) as error:
        raise CheckpointError(f"no readable cache in {str(path)!r}: {error}") from error
    if record.version != VERSION:
        raise CheckpointError(f"the cache in {str(path)!r} has version {record.version}; this package reads {VERSION}")
    if record.profile != fingerprint(profile):
        wanted = "no profile" if record.profile is None else f"the profile {record.profile[:12]}"
        raise CheckpointError(f"the cache in {str(path)!r} was coded with {wanted}; pass that one")
    options: dict[str, Any] = {"sinks": record.sinks, "window": record.window, "block": record.block}
    cache = CompressedCache(model, record.bits or 2.0, profile, mode=record.mode, **options)
    if len(record.sealed) != len(cache.compressed_layers):
        raise CheckpointError(
            f"the cache in {str(path)!r} has {len(record.sealed)} compressed layers, the model {len(cache.compressed_layers)}"
        )
    # What layers hold lies where the model is; payloads, positions and bases stay on the processor.
    device = next(model.parameters()).device
    tensors = {name: t.to(device) if name.startswith(_ON_DEVICE) else t for name, t in tensors.items()}
    try:
        _restore(cache, record, tensors)
    except (KeyError, IndexError, RuntimeError) as error:
        raise CheckpointError(f"the cache in {str(path)!r} lacks or misshapes a tensor: {error}") from error
    return cache


def _other_tensors(cache: CompressedCache, tensors: dict[str, Tensor]) -> dict[int, int | None]:
    found: dict[int, int | None] = {}
    everything: list[Any] = list(cache.layers)
    for index, layer in enumerate(everything):
        if getattr(layer, "owner", None) is cache or not getattr(layer, "is_initialized", False) or layer.keys is None:
            continue
        if not isinstance(layer, DynamicLayer) or layer.keys is None or layer.values is None:
            raise TensorNetError(f"layer {index} is a {type(layer).__name__}, whose state cannot be saved yet")
        tensors |= {f"other{index}.keys": layer.keys, f"other{index}.values": layer.values}
        found[index] = layer.cumulative_length if isinstance(layer, DynamicSlidingWindowLayer) else None
    return found


def _storage_record(cache: StorageCache, tensors: dict[str, Tensor], other: dict[int, int | None]) -> CacheRecord:
    if cache.bits is None:
        raise TensorNetError("a cache with a codec of its own cannot be saved; use bits and profile")
    payloads: dict[int, int] = {}
    rotaries: list[Rotary] = []
    blocks: list[list[BlockRecord]] = []
    for row, sequence in enumerate(cache.sequences):
        records = []
        for place, block in enumerate(sequence.blocks):
            number = payloads.setdefault(id(block.payload), len(payloads))
            tensors |= {f"payload{number}.{name}": t for name, t in block.payload.tensors.items()}
            if isinstance(block.positions, Tensor):
                tensors[f"positions{row}.{place}"] = block.positions
            rotary = None
            if block.rotary is not None:
                same = [i for i, known in enumerate(rotaries) if known.same_as(block.rotary)]
                rotary = same[0] if same else len(rotaries)
                if not same:
                    rotaries.append(block.rotary)
            records.append(
                BlockRecord(
                    start=block.start,
                    length=block.length,
                    skipped=block.skipped,
                    position=None if isinstance(block.positions, Tensor) else block.positions,
                    payload=number,
                    tokens=block.payload.tokens,
                    rotary=rotary,
                )
            )
        blocks.append(records)
        for place, (keys, values) in enumerate(sequence.sinks):
            tensors |= {f"sink{row}.{place}.keys": keys, f"sink{row}.{place}.values": values}
    tensors |= {f"rotary{i}": rotary.frequencies for i, rotary in enumerate(rotaries)}
    begin = 0 if cache.frozen else cache.sealed_length
    for place, layer in enumerate(cache.compressed_layers):
        tensors |= {f"tail{place}.keys": layer.keys[:, :, begin:], f"tail{place}.values": layer.values[:, :, begin:]}
    return CacheRecord(
        mode="storage",
        bits=cache.bits,
        sinks=cache.sinks,
        window=cache.window,
        block=cache.block,
        profile=fingerprint(cache.profile),
        sealed=[cache.sealed_length] * len(cache.compressed_layers),
        first=[sequence.first for sequence in cache.sequences],
        rotary_style=[rotary.style for rotary in rotaries],
        blocks=blocks,
        other=other,
    )


def _live_record(cache: LiveCache, tensors: dict[str, Tensor], other: dict[int, int | None]) -> CacheRecord:
    for place, layer in enumerate(cache.compressed_layers):
        tensors |= {f"tail{place}.keys": layer.keys, f"tail{place}.values": layer.values}
        for side, packed in (("keys", layer.packed_keys), ("values", layer.packed_values)):
            if packed is not None:
                tensors |= {f"codes{place}.{side}.{width}": part for width, part in packed.whole().items()}
        for name in ("sink_keys", "sink_values", "sink_index"):
            held = getattr(layer, name)
            if held is not None:
                tensors[f"{name}{place}"] = held
    tensors |= cache.own_tensors()
    return CacheRecord(
        mode="live",
        bits=cache.bits,
        sinks=cache.sinks,
        window=cache.window,
        block=cache.block,
        profile=fingerprint(cache.profile),
        sealed=[layer.sealed for layer in cache.compressed_layers],
        first=[],
        rotary_style=[],
        blocks=[],
        other=other,
    )


def _restore(cache: CompressedCache, record: CacheRecord, tensors: dict[str, Tensor]) -> None:
    for place, layer in enumerate(cache.compressed_layers):
        layer.lazy_initialization(tensors[f"tail{place}.keys"], tensors[f"tail{place}.values"])
        layer.keys, layer.values = tensors[f"tail{place}.keys"], tensors[f"tail{place}.values"]
    for index, length in record.other.items():
        kept: Any = cache.layers[index]
        kept.lazy_initialization(tensors[f"other{index}.keys"], tensors[f"other{index}.values"])
        kept.keys, kept.values = tensors[f"other{index}.keys"], tensors[f"other{index}.values"]
        if length is not None:
            kept.cumulative_length = length
    cache.positions = tensors.get("positions")
    cache.batch = len(tensors["tail0.keys"])
    if isinstance(cache, StorageCache):
        _restore_storage(cache, record, tensors)
    elif isinstance(cache, LiveCache):
        cache.restore_own(tensors)
        for place, layer in enumerate(cache.compressed_layers):
            layer.sealed = record.sealed[place]
            if layer.sealed:
                layer.packed_keys = Planes.of({width: tensors[f"codes{place}.keys.{width}"] for width in WIDTHS})
                layer.packed_values = Planes.of({width: tensors[f"codes{place}.values.{width}"] for width in WIDTHS})
                for name in ("sink_keys", "sink_values", "sink_index"):
                    setattr(layer, name, tensors[f"{name}{place}"])


def _restore_storage(cache: StorageCache, record: CacheRecord, tensors: dict[str, Tensor]) -> None:
    named: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith("payload"):
            number, part = name.removeprefix("payload").split(".", 1)
            named.setdefault(int(number), {})[part] = tensor
    payloads: dict[int, Payload] = {}
    rotaries = [Rotary(tensors[f"rotary{i}"], style) for i, style in enumerate(record.rotary_style)]  # type: ignore[arg-type]
    cache.sequences = []
    for row, (first, records) in enumerate(zip(record.first, record.blocks)):
        blocks = []
        for place, block in enumerate(records):
            payload = payloads.setdefault(block.payload, Payload(block.tokens, named.get(block.payload, {})))
            positions = tensors[f"positions{row}.{place}"] if block.position is None else block.position
            rotary = None if block.rotary is None else rotaries[block.rotary]
            blocks.append(Block(block.start, block.length, block.skipped, positions, payload, rotary))
        sinks = tuple(
            (tensors[f"sink{row}.{place}.keys"], tensors[f"sink{row}.{place}.values"])
            for place in range(len(cache.compressed_layers))
            if f"sink{row}.{place}.keys" in tensors
        )
        cache.sequences.append(Sequence(first, sinks, tuple(blocks)))
    cache.sealed_length = record.sealed[0]
    cache.frozen = cache.sealed_length > 0
