"""Statistics of one block of a model at a time, for models whose statistics together would not fit in memory.

The states at the last border are kept, so that blocks before it need not run again: without gradient metrics every block runs
once in all, as in one pass; with them every block has a backward pass of its own, which ends in that block.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tensornet_compress.calibrate.batches import call, model_inputs
from tensornet_compress.calibrate.blocks import Blocks, Border, EndOfPass, block_list
from tensornet_compress.calibrate.collect import Loss, collect_statistics, unreached
from tensornet_compress.calibrate.statistics import GradientStatistics
from tensornet_compress.metric import GRADIENT_KINDS, metric_kind


def statistics_by_block(
    model: nn.Module,
    batches: Sequence[Any],
    names: Collection[str],
    kinds: Collection[str],
    *,
    tied: Mapping[str, Sequence[str]] | None = None,
    loss: Loss | None = None,
    precision: torch.dtype | None = None,
    advance: Callable[[], None] = lambda: None,
    seed: int = 0,
) -> Iterator[dict[str, GradientStatistics]]:
    """What ``collect_statistics`` gives for all named layers at once, one block's layers after the other.

    Layers outside the blocks come first, all together; a model without a list of blocks has only those. Drop what was yielded
    before taking the next, and memory holds the statistics of one block, beside the states at one border (two while a block is
    crossed). Arguments as for ``collect_statistics``; ``advance`` is called once per batch and block.

    Raises:
        TensorNetError: as ``collect_statistics``; or the model does not call each block once per batch, in order.
    """
    wanted = [metric_kind(kind) for kind in kinds]
    gradients = bool(GRADIENT_KINDS & set(wanted))
    tied = tied or {}
    batches = list(batches)
    blocks = block_list(model, list(names))
    outside, *inside = _groups(blocks, names)

    def collect(group: Sequence[str], objective: Loss | None) -> dict[str, GradientStatistics]:
        options: Any = {"tied": tied, "precision": precision, "advance": advance, "seed": seed}
        return collect_statistics(model, batches, group, wanted, loss=objective, strict=False, **options)

    reached = not gradients
    border = Border(blocks)
    passes = [(None, outside)] if outside or not blocks else []
    for number, group in [*passes, *((number, group) for number, group in enumerate(inside) if group)]:
        if number is None:
            collected = collect(group, loss)
        else:
            # Modules that are tied to a layer may run behind its block.
            stop = not gradients and not any(tied.get(name) for name in group)
            with border.moved(number, len(batches), stop):
                collected = collect(group, loss if gradients else _stopped(loss))
        reached = reached or any(statistics.examples for statistics in collected.values())
        yield collected
        del collected
    if not reached:
        raise unreached(model)


def block_passes(model: nn.Module, names: Collection[str]) -> int:
    """How many passes over the batches ``statistics_by_block`` makes."""
    return max(1, sum(map(bool, block_groups(model, names))))


def block_groups(model: nn.Module, names: Collection[str]) -> list[list[str]]:
    """The names outside all blocks of a model, then those inside each."""
    return _groups(block_list(model, list(names)), names)


def _groups(blocks: Blocks, names: Collection[str]) -> list[list[str]]:
    """The names outside all blocks, then those inside each."""
    inside = [[name for name in names if name.startswith(f"{prefix}.")] for prefix, _ in blocks]
    held = {name for group in inside for name in group}
    return [[name for name in names if name not in held], *inside]


def _stopped(loss: Loss | None) -> Loss:
    """A pass that ends at a block; nothing is made of its loss."""

    def run(model: nn.Module, batch: Any) -> Tensor:
        device = next(model.parameters()).device
        try:
            if loss is not None:
                loss(model, batch)
            else:
                call(model, model_inputs(batch, device))
        except EndOfPass:
            pass
        return torch.zeros((), device=device)

    return run
