"""Statistics of one block of a model at a time, for models whose statistics together would not fit in memory.

The states at the last border are kept, so that blocks before it need not run again: without gradient metrics every block runs
once in all, as in one pass; with them every block has a backward pass of its own, which ends in that block.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from tensornet_compress.calibrate.batches import model_inputs
from tensornet_compress.calibrate.blocks import Blocks, block_list, replaced_forwards
from tensornet_compress.calibrate.collect import Loss, collect_statistics, unreached
from tensornet_compress.calibrate.statistics import GradientStatistics
from tensornet_compress.errors import TensorNetError
from tensornet_compress.metric import GRADIENT_KINDS, metric_kind


class _Stop(Exception):  # noqa: N818
    """Ends a forward pass whose rest is not needed."""


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
    batches = list(batches)
    blocks = block_list(model, list(names))
    outside, *inside = _groups(blocks, names)

    reached = False

    def collect(group: Sequence[str], objective: Loss | None) -> dict[str, GradientStatistics]:
        nonlocal reached
        found = collect_statistics(
            model,
            batches,
            group,
            wanted,
            tied=tied,
            loss=objective,
            precision=precision,
            advance=advance,
            seed=seed,
            strict=False,
        )
        reached = reached or not gradients or any(statistics.examples for statistics in found.values())
        return found

    if outside or not blocks:
        yield collect(outside, loss)
    crossing = _Crossing(blocks)
    for number, group in enumerate(inside):
        if group:
            # Modules that are tied to a layer may run behind its block.
            stop = not gradients and not any((tied or {}).get(name) for name in group)
            with crossing.until(number, stop=stop):
                found = collect(group, loss if gradients else _stopped(loss))
            crossing.check(len(batches))
            yield found
            del found
    if not reached:
        raise unreached(model)


def block_passes(model: nn.Module, names: Collection[str]) -> int:
    """How many passes over the batches ``statistics_by_block`` makes."""
    return max(1, sum(bool(group) for group in _groups(block_list(model, list(names)), names)))


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
                model(**model_inputs(batch, device))
        except _Stop:
            pass
        return torch.zeros((), device=device)

    return run


class _Crossing:
    """Outputs of one block for every batch, given back in place of running the blocks up to it."""

    def __init__(self, blocks: Blocks):
        self.blocks = blocks
        self._border = -1
        self._states: list[Any] = []
        self._fresh: list[Any] = []

    def until(self, number: int, stop: bool) -> ExitStack:
        """Inside, blocks before the border are replayed, and the outputs of block ``number``, the next border, are noted; the
        pass ends there if ``stop``."""
        self._fresh = []
        self._next = number
        waiting = iter(self._states)
        current: list[Any] = []

        def replay(position: int, _block: nn.Module) -> Callable[..., Any]:
            def forward(*_arguments: Any, **_keywords: Any) -> Any:
                if position == 0:
                    current[:] = [next(waiting, None)]
                return current[0]

            return forward

        def note(_module: nn.Module, _arguments: tuple[Any, ...], output: Any) -> None:
            self._fresh.append(_detached(output))
            if stop:
                raise _Stop

        stack = ExitStack()
        stack.enter_context(replaced_forwards(self.blocks[: self._border + 1], replay))
        stack.callback(self.blocks[number][1].register_forward_hook(note).remove)
        return stack

    def check(self, batches: int) -> None:
        """Move the border behind the block that was crossed.

        Raises:
            TensorNetError: its outputs are not one per batch.
        """
        if len(self._fresh) != batches:
            raise TensorNetError(
                f"block {self.blocks[self._next][0]!r} ran {len(self._fresh)} times for {batches} batches; statistics by block "
                "need every block to run once per batch"
            )
        self._border, self._states, self._fresh = self._next, self._fresh, []


def _detached(output: Any) -> Any:
    if isinstance(output, Tensor):
        return output.detach()
    return tuple(_detached(part) for part in output) if isinstance(output, tuple) else output
