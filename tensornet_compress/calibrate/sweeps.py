"""The Fisher metrics of one block of a model at a time, in two sweeps over its blocks.

Forwards, what enters each block is written to a folder; at the end the loss gives the gradient of the last states. Backwards,
each block runs once more from what entered it and takes that gradient one block further. Memory holds the activations and the
statistics of one block, and the numbers are those of one pass over the whole model: the same operations in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save_file
from torch import Tensor, nn

from tensornet_compress.calibrate.batches import Batch, call, kept_output, model_inputs
from tensornet_compress.calibrate.blocks import BlockRunner, EndOfPass, block_list, replaced_forwards
from tensornet_compress.calibrate.by_blocks import block_groups
from tensornet_compress.calibrate.divergence import sampled_loss
from tensornet_compress.calibrate.fisher_metrics import GROUP, FisherCollector, in_groups
from tensornet_compress.calibrate.hooks import autocast, calls_and_gradients, frozen, hooked
from tensornet_compress.calibrate.lending import lent
from tensornet_compress.errors import TensorNetError
from tensornet_compress.files.steps import Steps
from tensornet_compress.memory import release, trim
from tensornet_compress.metric import StoredMetric
from tensornet_compress.nn import Target

_TOLERANCE = 1e-3
_PROBE = 32
OUTSIDE = ("tail", "start")
"""What sums of what lies outside blocks are called."""


class NotByBlocksError(TensorNetError):
    """A model whose blocks do not make up all of what happens between the first and the last of them."""


class FisherSweeps:
    """Both sweeps over one model and its calibration batches.

    Args:
        model, batches, targets, precision, seed: as for ``fisher_metrics``.
        steps: where what enters each block is kept, (blocks + 1) x tokens x width numbers, and the metrics.
        device: where passes run, which has to hold one block and what lies outside blocks; None where the model is.
        advance: called once for each batch and block.
        group, scratch: number of a group that is swept by itself, and how the names of its files begin.
        proved: whether another object was made of the same model before.

    Raises:
        NotByBlocksError: the model does more than hand states from block to block: it was tried on the first batch.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Sequence[Batch],
        targets: Sequence[Target],
        steps: Steps,
        *,
        precision: torch.dtype | None = None,
        device: torch.device | None = None,
        advance: Callable[[], None] = lambda: None,
        seed: int = 0,
        group: int = 0,
        scratch: str = "",
        proved: bool = False,
    ):
        self.seed, self.group, self.scratch = seed, group, scratch
        self.model, self.batches, self.precision, self.advance = model, batches, precision, advance
        self.device = device or next(model.parameters()).device
        self.lent_to, self.steps = device, steps
        names = [target.name for target in targets]
        self.blocks = [block for _, block in block_list(model, names)]
        if not self.blocks:
            raise NotByBlocksError(f"{type(model).__name__} has no list of blocks")
        self.targets, named = targets, {target.name: target for target in targets}
        self.groups = list(in_groups(range(len(batches))))
        outside, *inside = ([named[name] for name in part] for part in block_groups(model, names))
        self.outside, self.inside = outside, inside
        for part in [outside, *inside]:
            own = {target.name for target in part}
            if strangers := [t.name for target in part for t in targets if t.name in target.tied and t.name not in own]:
                raise NotByBlocksError(f"{strangers[0]!r} is tied to a layer of another block")
        try:
            with self.ready():
                if not proved:
                    self._prove(names)
                with self._lent(0):
                    self.runner = BlockRunner(model, batches, names, precision)
        except NotByBlocksError:
            raise
        except Exception as error:
            # Whatever the model's own code raises when it is not called as it expects.
            raise NotByBlocksError(f"its blocks cannot be run by themselves ({error})") from error
        self._tokens = [0] * len(batches)

    def metrics(self) -> Iterator[tuple[str, StoredMetric]]:
        """Names and metrics of the targets that calibration reached, the last block's first, those outside blocks at the end.

        Raises:
            TensorNetError: no batch holds a token, or no target reaches the loss.
        """
        with self.ready():
            self._forward_sweep()
            outside = self._tail()
            if not any(self._tokens):
                raise TensorNetError("no calibration batch holds a token that is not padding; check their attention_mask")
            for number in reversed(range(len(self.blocks))):
                yield from self._stored(f"backwards-{number}", number).items()
                self._forget(number)
            outside.merge(self._start())
            yield from StoredMetric.write_all(outside.metrics(self.outside).items(), self.steps.folder, "outside").items()

    def sums(self) -> Iterator[tuple[str, FisherCollector]]:
        """What one group told of each block, the last first, and of what lies behind and before them."""
        with self.ready():
            self._forward_sweep()
            tail = self._tail()
            for number in reversed(range(len(self.blocks))):
                yield f"block-{number}", self._backwards(number)
                self._forget(number)
            yield from zip(OUTSIDE, (tail, self._start()))

    def finish(self, step: str, found: Mapping[str, StoredMetric], others: Sequence[Path] = ()) -> None:
        """Record metrics, and other files that were written with them."""
        files = [*others, *(file for metric in found.values() for file in metric.files)]
        self.steps.finish(step, {name: metric.to_json() for name, metric in found.items()}, files)

    def _forward_sweep(self) -> None:
        for batch, state in enumerate(self.runner.states):
            self._keep("state", 0, batch, state)
        self.runner.states = []
        for number in range(len(self.blocks)):
            if self.steps.found(f"forwards-{number}") is None:
                self._forwards(number)
                self.steps.finish(f"forwards-{number}", True, self._files("state", number + 1))

    def _forget(self, number: int) -> None:
        """Remove what no block before this one needs."""
        for file in [*self._files("gradient", number + 1), *self._files("state", number)]:
            file.unlink(missing_ok=True)

    def _stored(self, step: str, number: int) -> dict[str, StoredMetric]:
        """The metrics of a block, from an earlier run where that came so far."""
        folder = self.steps.folder
        known = self.steps.found(step)
        if known is None:
            targets = self.inside[number]
            found = StoredMetric.write_all(self._backwards(number).metrics(targets).items(), folder, step)
            self.finish(step, found, self._files("gradient", number))
        else:
            found = {name: StoredMetric.from_json(folder, *told) for name, told in known.items()}
        return found

    def _lent(self, number: int) -> AbstractContextManager[None]:
        """Block ``number`` on the device."""
        return lent(self.blocks[number].modules(), self.lent_to)

    @contextmanager
    def ready(self) -> Iterator[None]:
        """All that lies outside blocks on the device, and the model frozen: once, as large models have many modules."""
        inside = {part for block in self.blocks for part in block.modules()}
        with lent((part for part in self.model.modules() if part not in inside), self.lent_to), frozen(self.model):
            yield

    @staticmethod
    def _let_go(part: nn.Module) -> None:
        """Give back the memory of parameters, and what was freed since the last time."""
        release(part)
        trim()

    def _files(self, kind: str, number: int) -> list[Path]:
        return [self._file(kind, number, batch) for batch in range(len(self.batches)) if kind == "state" or self._tokens[batch]]

    def _prove(self, names: Sequence[str]) -> None:
        """Refuse a model whose answer to the first batch is another when its blocks are given the states alone, or whose blocks
        are given anything else that a target had a part in."""
        batch = _beginning(self.batches[0])
        inputs = model_inputs(batch, self.device)
        collector = FisherCollector(self.model, self.outside)
        collector.begin(batch)
        with self._lent(0):
            runner = BlockRunner(self.model, [batch], names, self.precision)

        def placed(number: int, block: nn.Module) -> Callable[..., Any]:
            original = block.forward

            def run(*given: Any, **named: Any) -> Any:
                with self._lent(number):
                    output = original(*given, **named)
                release(block)
                return output

            return run

        passing = autocast(self.device, self.precision)
        with replaced_forwards(runner.blocks, placed), torch.no_grad(), passing:
            whole = kept_output(self.model, inputs)[0]
        state = runner.states[0]
        for number, (name, _) in enumerate(runner.blocks):
            # Blocks that keep something from one call to the next show it at the second.
            with self._lent(number), torch.enable_grad():
                (after,) = runner.outputs(number, [state])
                for _ in range(2):
                    again = runner.run(number, 0, state.requires_grad_())
                    if not _alike(again.detach(), after):
                        raise NotByBlocksError(f"block {name!r} does not give the same when it is called again")
                    again.sum().backward()
            state = after
            release(runner.blocks[number][1])
        strange: list[str] = []
        reached = -1
        last = len(runner.blocks) - 1

        def called(name: str, *given: Any) -> Any:
            if 0 <= reached < last:
                raise NotByBlocksError(f"{name!r} is called between its blocks")
            return None if reached == last else collector.called(name, *given)

        def forward(number: int, _block: nn.Module) -> Callable[..., Any]:
            def run(given: Tensor, *arguments: Any, **keywords: Any) -> Any:
                nonlocal reached
                others = [*arguments, *keywords.values()]
                strange.extend(runner.blocks[number][0] for other in others if _asks_for_gradient(other))
                reached = number
                return runner.given_back(state if number == last else given.detach())

            return run

        with ExitStack() as stack:
            stack.enter_context(hooked(calls_and_gradients(collector.modules, called)))
            stack.enter_context(torch.enable_grad())
            stack.enter_context(autocast(self.device, self.precision))
            stack.enter_context(replaced_forwards(runner.blocks, forward))
            parts = kept_output(self.model, inputs)[0]
        if strange:
            raise NotByBlocksError(f"block {strange[0]!r} is given more than states that depends on layers to compress")
        # Whatever is called ahead of the blocks was cut off from what they give.
        if parts.requires_grad:
            raise NotByBlocksError("layers ahead of its blocks reach the loss by another way than through them")
        release(self.model)
        if not _alike(parts, whole):
            raise NotByBlocksError("its blocks, run one after the other, do not give what the model gives")
        trim()

    def _forwards(self, number: int) -> None:
        with self._lent(number), torch.no_grad():
            for batch in range(len(self.batches)):
                state = self.runner.run(number, batch, self._kept("state", number, batch))
                self._keep("state", number + 1, batch, state)
                self.advance()
        self._let_go(self.runner.blocks[number][1])

    def _tail(self) -> FisherCollector:
        """What comes behind the last block, the loss, and the gradients of the states before."""
        total = FisherCollector(self.model, self.outside)
        for group in self.groups:
            total.merge(self._tail_of(group))
        self._let_go(self.model)
        return total

    def _tail_of(self, group: Sequence[int]) -> FisherCollector:
        collector, blocks = FisherCollector(self.model, self.outside), self.runner.blocks
        generator = torch.Generator(device=self.device).manual_seed(self.seed + self.group + group[0] // GROUP)
        behind = False

        def called(*given: Any) -> Any:
            return collector.called(*given) if behind else None

        for batch in group:
            data = self.batches[batch]
            state = self._kept("state", len(blocks), batch).requires_grad_()

            def forward(number: int, _block: nn.Module, state: Tensor = state) -> Callable[..., Any]:
                def run(given: Tensor, *_arguments: Any, **_keywords: Any) -> Any:
                    nonlocal behind
                    behind = number == len(blocks) - 1
                    return self.runner.given_back(state if behind else given)

                return run

            behind = False
            collector.begin(data)
            with hooked(calls_and_gradients(collector.modules, called)), torch.enable_grad():
                with replaced_forwards(blocks, forward), autocast(self.device, self.precision):
                    output, is_logits = kept_output(self.model, model_inputs(data, self.device))
                self._tokens[batch] = len(output)
                if not len(output):
                    continue
                collector.end_forward(output if is_logits else None)
                collector.tokens += len(output)
                total = sampled_loss(output, is_logits, generator)
                if not total.requires_grad:
                    raise TensorNetError(f"no targeted layer reaches the loss of {type(self.model).__name__}")
                total.backward()
            self._keep("gradient", len(blocks), batch, torch.zeros_like(state) if state.grad is None else state.grad)
            # Logits are large, and what held them is in the way of what the next batch takes.
            del output, total
            trim()
        return collector

    def _backwards(self, number: int) -> FisherCollector:
        total = FisherCollector(self.model, self.inside[number])
        with self._lent(number):
            for group in self.groups:
                total.merge(self._backwards_of(number, group))
        self._let_go(self.runner.blocks[number][1])
        return total

    def _backwards_of(self, number: int, group: Sequence[int]) -> FisherCollector:
        collector = FisherCollector(self.model, self.inside[number])
        hooks = hooked(calls_and_gradients(collector.modules, collector.called))
        with hooks, torch.enable_grad():
            for batch in group:
                if tokens := self._tokens[batch]:
                    collector.begin(self.batches[batch])
                    state = self._kept("state", number, batch).requires_grad_()
                    output = self.runner.run(number, batch, state)
                    collector.end_forward(None)
                    collector.tokens += tokens
                    output.backward(self._kept("gradient", number + 1, batch))
                    self._keep("gradient", number, batch, torch.zeros_like(state) if state.grad is None else state.grad)
                self.advance()
        return collector

    def _start(self) -> FisherCollector:
        """What comes before the first block, with the gradient of the states that enter it."""
        total = FisherCollector(self.model, self.outside)
        for group in self.groups:
            total.merge(self._start_of(group))
        self._let_go(self.model)
        return total

    def _start_of(self, group: Sequence[int]) -> FisherCollector:
        collector = FisherCollector(self.model, self.outside)
        entry: list[Tensor] = []

        def forward(_number: int, _block: nn.Module) -> Callable[..., Any]:
            def run(given: Tensor, *_arguments: Any, **_keywords: Any) -> Any:
                entry.append(given)
                raise EndOfPass

            return run

        for batch in group:
            if not self._tokens[batch]:
                continue
            data = self.batches[batch]
            collector.begin(data)
            with hooked(calls_and_gradients(collector.modules, collector.called)), torch.enable_grad():
                stopped = replaced_forwards(self.runner.blocks[:1], forward)
                with stopped, autocast(self.device, self.precision), suppress(EndOfPass):
                    call(self.model, model_inputs(data, self.device))
                collector.end_forward(None)
                state = entry.pop()
                if state.requires_grad:
                    state.backward(self._kept("gradient", 0, batch))
        return collector

    def _file(self, kind: str, number: int, batch: int) -> Path:
        return self.steps.folder / f"{self.scratch}{kind}-{number}-{batch}.safetensors"

    def _keep(self, kind: str, number: int, batch: int, state: Tensor) -> None:
        save_file({"state": state.detach().cpu().contiguous()}, self._file(kind, number, batch))

    def _kept(self, kind: str, number: int, batch: int) -> Tensor:
        # Read, not mapped: mapped pages count as memory; and copied to where PyTorch aligns it, as some products round by that.
        return load(self._file(kind, number, batch).read_bytes())["state"].clone().to(self.device)


def sweep_steps(model: nn.Module, batches: int, names: Sequence[str]) -> int:
    """How often ``advance`` is called."""
    return 2 * batches * len(block_list(model, names))


def _beginning(batch: Batch) -> Batch:
    """The first tokens of a batch of nothing but ids, enough to see what blocks hand on to each other; others whole."""
    if isinstance(batch, Tensor) and batch.ndim == 2 and not batch.is_floating_point():
        return batch[:, :_PROBE]
    return batch


def _alike(found: Tensor, wanted: Tensor) -> bool:
    """Whether two outputs differ by no more than rounding."""
    if found.shape != wanted.shape or torch.equal(found, wanted):
        return found.shape == wanted.shape
    scale = max(float(part.abs().max()) for part in wanted.split(64))
    return all(float((a - b).abs().max()) <= _TOLERANCE * scale for a, b in zip(found.split(64), wanted.split(64)))


def _asks_for_gradient(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.requires_grad
    if isinstance(value, dict):
        value = list(value.values())
    return isinstance(value, list | tuple) and any(map(_asks_for_gradient, value))
