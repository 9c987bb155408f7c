"""Calibration batches: what a model is called with, what it gives back, and which of that is not padding."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tensornet_compress.errors import TensorNetError
from tensornet_compress.nn.finite import require_finite

# Integer ids (batch, length), keyword arguments by name, positional arguments in order, or one floating-point tensor.
Batch = Tensor | Mapping[str, Any] | Sequence[Any]
# Positions and names of arguments, and their values.
Inputs = dict[Any, Any]

# Parts of an output that repeat the inside of a model, or what the caller gave.
_NO_ANSWERS = ("loss", "hidden_states", "attentions", "past_key_values", "encoder_last_hidden_state", "rope_deltas")


def named_parts(batch: Batch) -> Mapping[Any, Any]:
    """A batch by the names, or else the positions, of its parts; plain ids are ``input_ids``."""
    if isinstance(batch, Tensor):
        return {0 if batch.is_floating_point() else "input_ids": batch}
    return batch if isinstance(batch, Mapping) else dict(enumerate(batch))


def model_inputs(batch: Batch, device: torch.device) -> Inputs:
    """What a model is called with, on a device: see ``call``.

    Raises:
        TensorNetError: a batch without a tensor, or ids that are not (batch, length).
    """
    parts = named_parts(batch) if isinstance(batch, Tensor | Mapping | Sequence) else {}
    tensors = [part for name, part in parts.items() if isinstance(part, Tensor) and name != "attention_mask"]
    ids = parts.get("input_ids")
    strange = isinstance(ids, Tensor) and (ids.ndim < 2 or ids.is_floating_point() or ids.dtype == torch.bool)
    if strange or not any(part.numel() for part in tensors):
        given: Any = {name: (tuple(getattr(v, "shape", ())), str(getattr(v, "dtype", ""))) for name, v in parts.items()}
        given = given or type(batch).__name__
        raise TensorNetError(
            "a batch must hold integer input_ids of shape (batch, length), not empty, or be what the model is called with: "
            f"keywords in a mapping, positional arguments in a sequence, or a tensor; was given {given}"
        )
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in parts.items()}


def check_calibration(model: nn.Module, batches: Iterable[Batch]) -> None:
    """Refuse a model with broken weights, and batches that it cannot be called with, before the work.

    Raises:
        TensorNetError: weights that are not finite; nothing to call the model with, or ids outside the vocabulary.
    """
    require_finite(model)
    for batch in batches:
        inputs = model_inputs(batch, torch.device("cpu"))
        ids, first = inputs.get("input_ids"), inputs.get(0)
        if isinstance(ids, Tensor):
            check_vocabulary(model, ids)
        elif getattr(model, "main_input_name", "") == "input_ids" and isinstance(first, Tensor) and first.is_floating_point():
            raise TensorNetError(
                f"a {type(model).__name__} reads integer input_ids of shape (batch, length), was given {tuple(first.shape)} "
                f"{first.dtype}"
            )


def check_vocabulary(model: nn.Module, ids: Tensor) -> None:
    """Raises TensorNetError for ids that a model has no embedding for; models that do not show theirs are not asked."""
    find: Any = getattr(model, "get_input_embeddings", None)
    try:
        words = getattr(find() if callable(find) else None, "num_embeddings", None)
    except NotImplementedError:
        words = None
    low, high = map(int, ids.aminmax())
    if words is not None and (low < 0 or high >= words):
        raise TensorNetError(f"token ids from {low} to {high} are not in the model's vocabulary of {words}; use its tokenizer")


def call(model: nn.Module, inputs: Inputs) -> Any:
    """Call a model with ``model_inputs``; ids go by position to a model that has no argument ``input_ids``."""
    positional = [value for name, value in inputs.items() if isinstance(name, int)]
    named = {name: value for name, value in inputs.items() if not isinstance(name, int)}
    if list(named) == ["input_ids"]:
        accepted = inspect.signature(model.forward).parameters
        if "input_ids" not in accepted and not any(part.kind is part.VAR_KEYWORD for part in accepted.values()):
            return model(named["input_ids"])
    return model(*positional, **named)


def model_output(model: nn.Module, inputs: Inputs) -> tuple[Tensor, bool]:
    """What a model answers, (..., n), and whether it holds logits.

    That is ``logits`` (labels last), else ``last_hidden_state``, else its only tensor; maps
    (examples, channels, height, width) are one vector an example. Several heads become one vector an
    example, (examples, n): all floating-point tensors of a mapping, list, tuple or output class. Of a tuple whose tensors have
    no axis of examples in common (an output, and a state), and of one that a transformers model gives, it is the first.

    Raises:
        TensorNetError: there is no such tensor, or heads differ in their number of examples.
    """
    result = call(model, inputs)
    logits = getattr(result, "logits", None)
    if isinstance(logits, Tensor):
        return _labels_last(logits, getattr(model, "config", None))
    output = getattr(result, "last_hidden_state", result)
    heads = [output] if isinstance(output, Tensor) and output.is_floating_point() else _heads(output)
    unlike = len({len(head) for head in heads if head.ndim}) > 1
    if type(output) is tuple and (unlike or hasattr(model, "config")):
        heads, unlike = heads[:1], False
    if not heads or unlike:
        shapes = [tuple(head.shape) for head in heads]
        raise TensorNetError(
            f"{type(model).__name__} gives a {type(result).__name__} without 'logits' or 'last_hidden_state'"
            + (f", and its tensors {shapes} have no axis of examples in common" if heads else " and without a tensor")
            + "; pass loss=, a function (model, batch) that gives a loss summed over examples"
        )
    if len(heads) == 1:
        return (heads[0].flatten(1) if heads[0].ndim > 3 else heads[0]), False
    return torch.cat([head.flatten(1).float() if head.ndim > 1 else head[:, None].float() for head in heads], 1), False


def _labels_last(logits: Tensor, config: Any) -> tuple[Tensor, bool]:
    """Logits with labels as last axis; of one label there is no distribution, but a number for each position."""
    if logits.ndim == 4 and logits.shape[1] == getattr(config, "num_labels", None):
        logits = logits.movedim(1, -1)
    if logits.shape[-1] > 1:
        return logits, True
    return (logits.flatten(1) if logits.ndim > 2 else logits.reshape(1, -1)), False


def _heads(output: Any) -> list[Tensor]:
    """The floating-point tensors of an output, those of nested parts only where there are no others."""
    if isinstance(output, Mapping):
        output = [value for name, value in output.items() if name not in _NO_ANSWERS]
    if not isinstance(output, list | tuple):
        return []
    own = [part for part in output if isinstance(part, Tensor) and part.is_floating_point() and part.ndim]
    return own or [head for part in output for head in ([] if isinstance(part, Tensor) else _heads(part))]


def kept_output(model: nn.Module, inputs: Inputs) -> tuple[Tensor, bool]:
    """Outputs at positions that are not padding, (tokens, n), and whether they are logits."""
    output, logits = model_output(model, inputs)
    decodes = any(str(name).startswith("decoder_") for name in inputs)
    return without_padding(output, inputs.get("decoder_attention_mask" if decodes else "attention_mask")), logits


def without_padding(vectors: Tensor, mask: Tensor | None) -> Tensor:
    """Vectors (..., n) at the positions of a mask (...), as (tokens, n); all of them if the mask is of another shape."""
    if mask is not None and mask.shape == vectors.shape[:-1]:
        return vectors[mask.bool().to(vectors.device)]
    return vectors.reshape(-1, vectors.shape[-1])


def token_count(batches: Iterable[Batch]) -> int | None:
    """Tokens of batches of ids, padding aside; None where there are none, or batches are something else."""
    total = 0
    for batch in batches:
        parts = named_parts(batch)
        ids, mask = parts.get("input_ids"), parts.get("attention_mask")
        if not isinstance(ids, Tensor):
            return None
        total += int(mask.sum()) if isinstance(mask, Tensor) and mask.shape == ids.shape else ids.numel()
    return total or None


def calibration_fingerprint(batches: Iterable[Batch]) -> str:
    """SHA-256 over the token ids and masks, or whatever else the calibration batches hold."""
    digest = hashlib.sha256()
    for batch in batches:
        for name, part in sorted((str(name), part) for name, part in named_parts(batch).items()):
            if isinstance(part, Tensor):
                digest.update(f"{name}{tuple(part.shape)}{part.dtype}".encode())
                digest.update(part.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
            else:
                digest.update(f"{name}{part!r}".encode())
    return digest.hexdigest()
