"""The state of a long iteration in one safetensors file: tensors, and in its metadata a JSON log, the settings and a hash."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tensornet_compress.errors import CheckpointError
from tensornet_compress.files.whole import whole_file


def save_state(file: Path, settings: Mapping[str, Any], log: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write under a temporary name, then rename: a file of that name is always whole."""
    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    metadata = {
        "settings": json.dumps(settings, sort_keys=True),
        "log": json.dumps(log),
        "tensors": content_hash(plain),
    }
    with whole_file(file) as temporary:
        save_file(plain, temporary, metadata)


def content_hash(content: Any) -> str:
    """BLAKE2 over the tensors and plain values of nested dicts and sequences."""
    digest = hashlib.blake2b(digest_size=16)

    def take(part: Any) -> None:
        if isinstance(part, Tensor):
            flat = part.detach().cpu().contiguous().flatten()
            digest.update(f"{part.dtype}{tuple(part.shape)}".encode())
            digest.update(flat.view(torch.uint8).numpy().data if flat.numel() else b"")
        elif isinstance(part, Mapping):
            digest.update(f"{{{len(part)}".encode())
            for key in sorted(part):
                digest.update(repr(key).encode())
                take(part[key])
        elif isinstance(part, list | tuple):
            digest.update(f"[{len(part)}".encode())
            for item in part:
                take(item)
        else:
            digest.update(repr(part).encode())

    take(content)
    return digest.hexdigest()


def load_state(file: Path, settings: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
    """Log and tensors, or None when there is no such file.

    Raises:
        CheckpointError: the file is broken, or was written with other settings.
    """
    if not file.exists():
        return None
    try:
        with safe_open(str(file), framework="pt") as opened:
            metadata = opened.metadata() or {}
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{str(file)!r} is no whole state file: {error}; delete it to start anew") from error
    if metadata.get("tensors") != content_hash(tensors):
        raise CheckpointError(f"{str(file)!r} is damaged: its tensors are not those that were written; delete it to start anew")
    wanted = json.dumps(settings, sort_keys=True)
    if metadata.get("settings") != wanted:
        raise CheckpointError(
            f"{str(file)!r} was written with other settings ({metadata.get('settings')}), these are {wanted}; "
            "delete it to start anew"
        )
    log: dict[str, Any] = json.loads(metadata["log"])
    return log, tensors
