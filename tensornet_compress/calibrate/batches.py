"""Calibration batches: what a model is called with, what it gives back, and which of that is not padding."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tensornet_compress.errors import TensorNetError
from tensornet_compress.nn.finite import require_finite

Batch = Tensor | Mapping[str, Tensor]


def named_parts(batch: Batch) -> Mapping[str, Tensor]:
    """A batch by the names of its tensors; plain ids are ``input_ids``."""
    return {"input_ids": batch} if isinstance(batch, Tensor) else batch


def model_inputs(batch: Batch, device: torch.device) -> dict[str, Tensor]:
    """A batch (ids, or a dict with ``input_ids`` and perhaps ``attention_mask``) -> keyword arguments of the model."""
    parts = named_parts(batch)
    ids = parts.get("input_ids")
    if ids is None or ids.ndim != 2 or not ids.numel() or ids.is_floating_point() or ids.dtype == torch.bool:
        given = {name: (tuple(value.shape), str(value.dtype)) for name, value in parts.items()}
        raise TensorNetError(f"a batch must hold integer input_ids of shape (batch, length), not empty, was given {given}")
    return {name: value.to(device) for name, value in parts.items()}


def check_calibration(model: nn.Module, batches: Iterable[Batch]) -> None:
    """Refuse a model with broken weights, and batches that it cannot be called with, before the work.

    Raises:
        TensorNetError: weights that are not finite; no token ids, or ids outside the vocabulary.
    """
    require_finite(model)
    for batch in batches:
        check_vocabulary(model, model_inputs(batch, torch.device("cpu"))["input_ids"])


def check_vocabulary(model: nn.Module, ids: Tensor) -> None:
    """Raises TensorNetError for ids that a model has no embedding for; models that do not show theirs are not asked."""
    find: Any = getattr(model, "get_input_embeddings", None)
    words = getattr(find() if callable(find) else None, "num_embeddings", None)
    low, high = map(int, ids.aminmax())
    if words is not None and (low < 0 or high >= words):
        raise TensorNetError(f"token ids from {low} to {high} are not in the model's vocabulary of {words}; use its tokenizer")


def model_output(model: nn.Module, inputs: dict[str, Tensor]) -> tuple[Tensor, bool]:
    """The first tensor that a model gives, (..., n), and whether it holds logits.

    Raises:
        TensorNetError: the model gives neither logits, nor hidden states, nor a tensor.
    """
    result = model(**inputs)
    logits = getattr(result, "logits", None)
    output = logits if logits is not None else getattr(result, "last_hidden_state", result)
    if isinstance(output, tuple):
        output = output[0]
    if not isinstance(output, Tensor):
        raise TensorNetError(
            f"{type(model).__name__} gives a {type(output).__name__} without a tensor 'logits' or 'last_hidden_state'; "
            "wrap it in a module that gives one tensor"
        )
    return output, logits is not None


def kept_output(model: nn.Module, inputs: dict[str, Tensor]) -> tuple[Tensor, bool]:
    """Outputs at positions that are not padding, (tokens, n), and whether they are logits."""
    output, logits = model_output(model, inputs)
    return without_padding(output, inputs.get("attention_mask")), logits


def without_padding(vectors: Tensor, mask: Tensor | None) -> Tensor:
    """Vectors (..., n) at the positions of a mask (...), as (tokens, n); all of them if the mask is of another shape."""
    if mask is not None and mask.shape == vectors.shape[:-1]:
        return vectors[mask.bool().to(vectors.device)]
    return vectors.reshape(-1, vectors.shape[-1])


def calibration_fingerprint(batches: Iterable[Batch]) -> str:
    """SHA-256 over the token ids and masks of the calibration batches."""
    digest = hashlib.sha256()
    for batch in batches:
        for name, part in sorted(named_parts(batch).items()):
            digest.update(f"{name}{tuple(part.shape)}{part.dtype}".encode())
            digest.update(part.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
