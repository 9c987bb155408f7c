"""Measured sensitivity: what one layer's error costs at the model's output."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tensornet_compress.calibrate.blocks import block_list, replaced_forwards
from tensornet_compress.calibrate.divergence import output_divergence
from tensornet_compress.calibrate.modes import evaluating
from tensornet_compress.calibrate.moments import Batch, model_inputs
from tensornet_compress.calibrate.outputs import kept_output
from tensornet_compress.errors import TensorNetError


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
        ids = batch if isinstance(batch, Tensor) else batch["input_ids"]
        real = _real_tokens(batch, ids)
        if not real.any():
            continue
        start = int(real.any(0).int().argmax())
        window = slice(start, start + min(max(left, 1), longest))
        real = real[:, window]
        filled = real.any(1).nonzero()[:, 0]
        # Positions from the first real one of each row on.
        sizes = real.shape[1] - real[filled].int().argmax(1)
        count = max(1, int((sizes.cumsum(0) <= left).sum()))
        rows = filled[:count]
        kept.append(
            ids[rows.to(ids.device), window]
            if isinstance(batch, Tensor)
            else {name: value[rows.to(value.device), window] for name, value in batch.items()}
        )
        left -= int(sizes[:count].sum())
        if left <= 0:
            break
    if not kept:
        raise TensorNetError(
            f"none of the {len(batches)} calibration batches holds a token that is not padding; check their attention_mask"
        )
    return kept


def _real_tokens(batch: Batch, ids: Tensor) -> Tensor:
    """Which of the ids (rows, length) are not padding, boolean, on the CPU."""
    mask = None if isinstance(batch, Tensor) else batch.get("attention_mask")
    return torch.ones(ids.shape, dtype=torch.bool) if mask is None or mask.shape != ids.shape else mask.bool().cpu()


def measure_sensitivity(
    model: nn.Module,
    batches: Sequence[Batch],
    probes: Mapping[str, Callable[[], tuple[Tensor, float]]],
    advance: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Output divergence per unit of squared metric error, for each probed layer.

    ``probes[name]()`` gives a compressed weight, as the module stores it, and its squared error; the layer runs with it alone
    while everything else stays exact. Blocks before the probed one replay their recorded outputs, which halves the work.
    """
    device = next(model.parameters()).device
    inputs = [model_inputs(batch, device) for batch in batches]
    blocks = block_list(model, list(probes))
    with evaluating(model), torch.no_grad():
        recorded: list[list[Any]] = []
        references = []
        for batch in inputs:
            with _recording(blocks) as outputs:
                references.append(kept_output(model, batch))
            recorded.append(list(outputs))
        return {
            name: _probe(model, name, probe, inputs, references, blocks, recorded, advance) for name, probe in probes.items()
        }


def _probe(
    model: nn.Module,
    name: str,
    probe: Callable[[], tuple[Tensor, float]],
    inputs: Sequence[dict[str, Tensor]],
    references: Sequence[tuple[Tensor, bool]],
    blocks: Sequence[tuple[str, nn.Module]],
    recorded: Sequence[Sequence[Any]],
    advance: Callable[[], None],
) -> float:
    module = model.get_submodule(name)
    weight, error = probe()
    exact = module.weight
    assert isinstance(exact, nn.Parameter)
    kept = exact.data
    depth = next((i for i, (prefix, _) in enumerate(blocks) if name.startswith(f"{prefix}.")), 0)
    damage = 0.0
    try:
        exact.data = weight.to(kept)
        for batch, (reference, logits), outputs in zip(inputs, references, recorded):
            with _replaying(blocks[:depth], outputs):
                damage += output_divergence(reference, kept_output(model, batch)[0], logits)
    finally:
        exact.data = kept
    advance()
    return max(damage / len(inputs), 0.0) / max(error, 1e-300)


@contextmanager
def _recording(blocks: Sequence[tuple[str, nn.Module]]) -> Iterator[list[Any]]:
    outputs: list[Any] = []
    handles = [block.register_forward_hook(lambda _m, _i, output: outputs.append(output)) for _, block in blocks]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def _replaying(blocks: Sequence[tuple[str, nn.Module]], outputs: Sequence[Any]) -> AbstractContextManager[None]:
    """Blocks give back what they gave before, without computing."""
    return replaced_forwards(blocks, lambda number, _block: lambda *_arguments, **_keywords: outputs[number])
