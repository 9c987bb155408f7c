"""The state of a long iteration in one safetensors file: tensors, and a JSON log in its metadata."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tensornet_compress.errors import CheckpointError
from tensornet_compress.files import whole_file


def save_state(file: Path, settings: Mapping[str, Any], log: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write under a temporary name, then rename: a file of that name is always whole."""
    plain = {name: tensor.detach().contiguous().clone() for name, tensor in tensors.items()}
    with whole_file(file) as temporary:
        save_file(plain, temporary, {"settings": json.dumps(settings, sort_keys=True), "log": json.dumps(log)})


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
    wanted = json.dumps(settings, sort_keys=True)
    if metadata.get("settings") != wanted:
        raise CheckpointError(
            f"{str(file)!r} was written with other settings ({metadata.get('settings')}), these are {wanted}; "
            "delete it to start anew"
        )
    log: dict[str, Any] = json.loads(metadata["log"])
    return log, tensors
