"""Calibration batches: what a model is called with, and what tells two sets of them apart."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from tensornet_compress.errors import TensorNetError

Batch = Tensor | Mapping[str, Tensor]


def model_inputs(batch: Batch, device: torch.device) -> dict[str, Tensor]:
    """A batch (ids, or a dict with ``input_ids`` and perhaps ``attention_mask``) -> keyword arguments of the model."""
    if isinstance(batch, Tensor):
        batch = {"input_ids": batch}
    if "input_ids" not in batch or batch["input_ids"].ndim != 2 or batch["input_ids"].is_floating_point():
        found = {name: tuple(value.shape) for name, value in batch.items()}
        raise TensorNetError(f"a batch must hold integer input_ids of shape (batch, length), was given {found}")
    return {name: value.to(device) for name, value in batch.items()}


def calibration_fingerprint(batches: Iterable[Batch]) -> str:
    """SHA-256 over the token ids and masks of the calibration batches."""
    digest = hashlib.sha256()
    for batch in batches:
        parts = {"input_ids": batch} if isinstance(batch, Tensor) else dict(batch)
        for name in sorted(parts):
            digest.update(f"{name}{tuple(parts[name].shape)}{parts[name].dtype}".encode())
            digest.update(parts[name].cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
