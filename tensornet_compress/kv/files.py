"""Files of caches: safetensors with a JSON description in the header."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path
from typing import Annotated, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from tensornet_compress.errors import CheckpointError, TensorNetError
from tensornet_compress.files.hashes import HASHES
from tensornet_compress.files.reading import read_tensors
from tensornet_compress.files.whole import write_tensors
from tensornet_compress.frozen import Frozen
from tensornet_compress.nn import NetworkModule

VERSION = 1
LARGEST_BLOCK = 1024
"""Tokens of a sealed block, where the cache's own block is not larger."""
_SAMPLED = 32
_KEY = "tensornet_compress_kv"
Count = Annotated[int, Field(ge=0, le=1 << 31)]


class BlockRecord(Frozen):
    """A block of a storage cache; ``payload`` and ``rotary`` number the stored ones."""

    start: Count
    length: Annotated[int, Field(ge=1, le=1 << 31)]
    skipped: Count
    position: Count | None
    payload: Count
    tokens: Count
    rotary: Count | None


class CacheRecord(Frozen):
    """Everything of a saved cache that is not a tensor."""

    version: int = VERSION
    mode: Literal["live", "storage"]
    bits: float | None
    sinks: Count
    window: Count
    block: Annotated[int, Field(ge=1, le=1 << 16)]
    profile: str | None
    model: str | None = None
    """``weights_fingerprint`` of the model that filled it; older files have none."""
    sealed: Annotated[list[Count], Field(min_length=1)]
    first: list[Count] = Field(default_factory=list)
    rotary_style: list[Literal["half", "interleaved"]] = Field(default_factory=list)
    blocks: list[list[BlockRecord]] = Field(default_factory=list)
    other: dict[Count, Count | None]

    @model_validator(mode="after")
    def _blocks_hold_what_is_sealed(self) -> Self:
        if len(set(self.sealed)) > 1:
            raise ValueError(f"layers have sealed {sorted(set(self.sealed))} tokens; all must have sealed as many")
        if len(self.first) != len(self.blocks):
            raise ValueError(f"{len(self.first)} sequences and {len(self.blocks)} rows of blocks")
        if self.mode == "storage" and self.sealed[0] and not self.blocks:
            raise ValueError(f"{self.sealed[0]} sealed tokens and no blocks")
        for row, (first, blocks) in enumerate(zip(self.first, self.blocks)):
            end = 0
            for block in blocks:
                if block.start != end or max(block.length, block.tokens) > max(self.block, LARGEST_BLOCK):
                    raise ValueError(f"row {row} has a block of {block.length} tokens at {block.start}, after {end} tokens")
                end += block.length
                if block.length - block.skipped > block.tokens or block.skipped > max(0, first + self.sinks - block.start):
                    raise ValueError(f"row {row} has a block of {block.length} tokens, of which it holds {block.tokens}")
                if block.rotary is not None and block.rotary >= len(self.rotary_style):
                    raise ValueError(f"row {row} names rotary table {block.rotary} of {len(self.rotary_style)}")
            if end != self.sealed[0]:
                raise ValueError(f"row {row} has blocks of {end} tokens, {self.sealed[0]} are sealed")
            payloads = [block.payload for block in blocks if block.tokens]
            if len(set(payloads)) < len(payloads):
                raise ValueError(f"row {row} has the same payload twice")
        return self


def weights_fingerprint(model: nn.Module) -> str:
    """SHA-256 of names, shapes and a few numbers of every parameter, as bfloat16, and of the specs of networks: the same in
    whichever precision a model was loaded, another for a model that was trained further or compressed."""
    found = sha256()
    for name, parameter in model.named_parameters():
        found.update(f"{name.removeprefix('_orig_mod.')} {tuple(parameter.shape)}".encode())
        if parameter.numel() and not parameter.is_meta:
            places = torch.linspace(0, parameter.numel() - 1, min(parameter.numel(), _SAMPLED), dtype=torch.float64)
            numbers = parameter.detach().take(places.long().to(parameter.device)).to(torch.bfloat16)
            found.update(numbers.view(torch.int16).cpu().numpy().tobytes())
    for name, module in model.named_modules():
        if isinstance(module, NetworkModule):
            found.update(f"{name.removeprefix('_orig_mod.')} {module.spec.to_json()}".encode())
    return found.hexdigest()


def write_cache(path: str | Path, record: CacheRecord, tensors: dict[str, Tensor]) -> int:
    """Write a cache to one file, whole or not at all; returns the bytes of the file."""
    return write_tensors(path, tensors, {_KEY: record.to_json()})


def read_cache(
    path: str | Path, profile: str | None, model: nn.Module, verify: bool = True
) -> tuple[CacheRecord, dict[str, Tensor], bool]:
    """The description and the tensors of a file of ``write_cache``, and whether it has hashes.

    ``profile``: fingerprint of the one at hand. ``verify``: check the hashes, and that ``model`` has the weights of the one
    that filled the cache.

    Raises:
        CheckpointError: the file is missing, damaged, of another version, or was made with another profile or model.
    """
    tensors, header = read_tensors(path, verify)
    if _KEY not in header:
        raise CheckpointError(f"{str(path)!r} holds no cache")
    try:
        record = CacheRecord.from_json(header[_KEY])
    except TensorNetError as error:
        raise CheckpointError(f"no readable cache in {str(path)!r}: {error}") from error
    if record.version != VERSION:
        raise CheckpointError(f"the cache in {str(path)!r} has version {record.version}; this package reads {VERSION}")
    if record.profile != profile:
        wanted = "no profile" if record.profile is None else f"the profile {record.profile[:12]}"
        raise CheckpointError(f"the cache in {str(path)!r} was coded with {wanted}; pass that one")
    if verify and record.model not in (None, weights_fingerprint(model)):
        raise CheckpointError(
            f"the cache in {str(path)!r} was filled by a model with other weights, whose states mean nothing to this one; load "
            "that model, or pass verify=False to take the states all the same"
        )
    return record, tensors, HASHES in header
