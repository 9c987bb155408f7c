"""Calibration batches: what a model is called with, what it gives back, and which of that is not padding."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from tensornet_compress.errors import TensorNetError

Batch = Tensor | Mapping[str, Tensor]


def named_parts(batch: Batch) -> Mapping[str, Tensor]:
    """A batch by the names of its tensors; plain ids are ``input_ids``."""
    return {"input_ids": batch} if isinstance(batch, Tensor) else batch


def model_inputs(batch: Batch, device: torch.device) -> dict[str, Tensor]:
    """A batch (ids, or a dict with ``input_ids`` and perhaps ``attention_mask``) -> keyword arguments of the model."""
    parts = named_parts(batch)
    if "input_ids" not in parts or parts["input_ids"].ndim != 2 or parts["input_ids"].is_floating_point():
        given = {name: tuple(value.shape) for name, value in parts.items()}
        raise TensorNetError(f"a batch must hold integer input_ids of shape (batch, length), was given {given}")
    return {name: value.to(device) for name, value in parts.items()}


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


def first_tokens(batches: Sequence[Batch], tokens: int, longest: int) -> list[Batch]:
    """The first sequences of the first batches, up to about ``tokens`` tokens, each cut to at most ``longest``.

    Padding before the text counts as nothing: columns that start no text yet in any row are left out first, then rows whose
    text begins behind the cut. Padding behind the text counts with it.

    Raises:
        TensorNetError: no batch holds a token.
    """
    kept: list[Batch] = []
    left = tokens
    for batch in batches:
        parts = named_parts(batch)
        real = _real_tokens(parts)
        if not real.any():
            continue
        start = int(real.any(0).int().argmax())
        window = slice(start, start + min(max(left, 1), longest))
        real = real[:, window]
        filled = real.any(1).nonzero()[:, 0]
        # Positions from the first real one of each row on.
        sizes = real.shape[1] - real[filled].int().argmax(1)
        count = max(1, int((sizes.cumsum(0) <= left).sum()))
        cut = {name: part[filled[:count].to(part.device), window] for name, part in parts.items()}
        kept.append(cut["input_ids"] if isinstance(batch, Tensor) else cut)
        left -= int(sizes[:count].sum())
        if left <= 0:
            break
    if not kept:
        raise TensorNetError(
            f"none of the {len(batches)} calibration batches holds a token that is not padding; check their attention_mask"
        )
    return kept


def _real_tokens(parts: Mapping[str, Tensor]) -> Tensor:
    """Which of the ids (rows, length) are not padding, boolean, on the CPU."""
    mask, shape = parts.get("attention_mask"), parts["input_ids"].shape
    return torch.ones(shape, dtype=torch.bool) if mask is None or mask.shape != shape else mask.bool().cpu()
