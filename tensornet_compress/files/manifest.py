"""The JSON side of a saved folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from tensornet_compress.errors import CheckpointError, TensorNetError
from tensornet_compress.frozen import Frozen
from tensornet_compress.nn.plan import Plan

MANIFEST = "tensornet.json"
TENSORS = "model.safetensors"
FORMAT_VERSION = 1


class Manifest(Frozen):
    """What a reader needs beside the tensors.

    ``architecture``: class name in transformers, None for other models. ``shared``: tensor names that are one with another
    tensor in the file. ``nbytes``: bytes of all stored tensors. Packed fibre orders lie with the tensors; the plan in the
    manifest holds them as empty permutations.
    """

    format_version: Literal[1] = 1
    tool: str
    architecture: str | None
    nbytes: int
    original_nbytes: int | None = None
    shared: dict[str, str]
    plan: Plan
    layers: dict[str, dict[str, Any]] = Field(default_factory=dict)


def read_manifest(folder: str | Path) -> Manifest:
    """Read and validate the manifest of a saved folder.

    Raises:
        CheckpointError: no manifest, a version that this release does not know, or damaged JSON.
    """
    path = Path(folder) / MANIFEST
    if not path.is_file():
        raise CheckpointError(f"{str(folder)!r} is not a saved folder: it has no {MANIFEST}")
    text = path.read_text(encoding="utf-8", errors="replace")
    try:
        data = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise CheckpointError(f"{str(path)!r} is not JSON ({error}); the file is truncated or damaged") from error
    version = data.get("format_version") if isinstance(data, dict) else None
    if version != FORMAT_VERSION:
        raise CheckpointError(f"{str(path)!r} has format version {version!r}, this release reads {FORMAT_VERSION}")
    try:
        return Manifest.from_json(text)
    except TensorNetError as error:
        raise CheckpointError(f"{str(path)!r}: {error}") from error
