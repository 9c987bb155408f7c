"""Files of caches: safetensors with a JSON description in the header."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field
from torch import Tensor

from tensornet_compress.errors import CheckpointError, TensorNetError
from tensornet_compress.files.whole import read_tensors, write_tensors
from tensornet_compress.frozen import Frozen

VERSION = 1
_KEY = "tensornet_compress_kv"


class BlockRecord(Frozen):
    """A block of a storage cache; ``payload`` and ``rotary`` number the stored ones."""

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
    first: list[int] = Field(default_factory=list)
    rotary_style: list[Literal["half", "interleaved"]] = Field(default_factory=list)
    blocks: list[list[BlockRecord]] = Field(default_factory=list)
    other: dict[int, int | None]


def write_cache(path: str | Path, record: CacheRecord, tensors: dict[str, Tensor]) -> int:
    """Write a cache to one file, whole or not at all; returns the bytes of the file."""
    return write_tensors(path, tensors, {_KEY: record.to_json()})


def read_cache(path: str | Path, profile: str | None) -> tuple[CacheRecord, dict[str, Tensor]]:
    """The description and the tensors of a file of ``write_cache``; ``profile``: fingerprint of the one at hand.

    Raises:
        CheckpointError: the file is missing, damaged, of another version, or was coded with another profile.
    """
    tensors, header = read_tensors(path)
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
    return record, tensors
