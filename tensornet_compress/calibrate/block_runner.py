"""Running a model block by block: hidden states at one border, and what else the blocks are called with.

Only the states of one border are held, so that work on one block needs memory for one block, whatever the depth.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tensornet_compress.calibrate.blocks import find_blocks, replaced_forwards
from tensornet_compress.calibrate.modes import evaluating
from tensornet_compress.calibrate.moments import Batch, model_inputs
from tensornet_compress.errors import TargetError, TensorNetError

Hook = Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]


class _Stop(Exception):  # noqa: N818
    """Ends a forward pass whose rest is not needed."""


@dataclass(frozen=True)
class BlockCall:
    """What one block is called with beside its hidden states."""

    arguments: tuple[Any, ...]
    keywords: dict[str, Any]


class BlockRunner:
    """The blocks of a model, the states that enter the first one, and each block's other arguments.

    Args:
        model: a model whose layers lie in one ``nn.ModuleList``, each taking hidden states (rows, length, width) first and
            giving them back (alone, or first in a tuple), such as the decoders and encoders of transformers.
        batches: ids or dicts, see ``metric.Batch``.
        names: the modules that will be worked on; the list that holds most of them is taken.
        precision: dtype of ``torch.autocast`` for matrix products (hidden states keep the model's dtype), None for none.

    Raises:
        TargetError: no list of blocks holds the named modules.
    """

    def __init__(self, model: nn.Module, batches: Sequence[Batch], names: Sequence[str], precision: torch.dtype | None = None):
        self.blocks = find_blocks(model, names)
        self.device = next(model.parameters()).device
        self.precision = precision
        self.states: list[Tensor] = []
        self.masks: list[Tensor | None] = []
        self._calls: list[list[BlockCall]] = []
        with evaluating(model), torch.no_grad(), self._recording():
            for batch in batches:
                inputs = model_inputs(batch, self.device)
                mask = inputs.get("attention_mask")
                self.masks.append(None if mask is None else mask.bool())
                self._calls.append([])
                try:
                    model(**inputs)
                except _Stop:
                    continue
                raise TensorNetError(f"{type(model).__name__} did not call its blocks in order; it cannot be run by blocks")
        if not self.states:
            raise TensorNetError("calibration was given no batches")

    def _recording(self) -> AbstractContextManager[None]:
        """Blocks note their arguments and pass the states on; the last one ends the pass."""
        as_tuple: list[bool] = []

        def stand_in(number: int, block: nn.Module) -> Any:
            original = block.forward

            def forward(state: Tensor, *arguments: Any, **keywords: Any) -> Any:
                given = {name: _without_cache(value) for name, value in keywords.items()}
                if "use_cache" in given:
                    given["use_cache"] = False
                call = BlockCall(tuple(_without_cache(value) for value in arguments), given)
                if number == 0:
                    self.states.append(state)
                    if not as_tuple:
                        as_tuple.append(isinstance(original(state.clone(), *call.arguments, **call.keywords), tuple))
                self._calls[-1].append(call)
                if number == len(self.blocks) - 1:
                    raise _Stop
                return (state,) if as_tuple[0] else state

            return forward

        return replaced_forwards(self.blocks, stand_in)

    def run(self, number: int, batch: int, state: Tensor) -> Tensor:
        """States (rows, length, width) after block ``number``, for the arguments of batch ``batch``; ``state`` stays what it
        is, also when the block changes what it is given in place."""
        call = self._calls[batch][number]
        with self.autocast():
            result = self.blocks[number][1](state.clone(), *call.arguments, **call.keywords)
        output: Tensor = result[0] if isinstance(result, tuple) else result
        return output

    def run_until(self, number: int, batch: int, state: Tensor, hooks: dict[str, Hook], last: str) -> None:
        """Run a block with pre-hooks on modules (names inside the block), and stop when ``last`` was reached."""
        with self.listening(number, hooks, last):
            try:
                self.run(number, batch, state)
            except _Stop:
                return
        raise TensorNetError(f"block {self.blocks[number][0]!r} never called its module {last!r}")

    @contextmanager
    def listening(self, number: int, hooks: dict[str, Hook], last: str | None = None) -> Iterator[None]:
        """Pre-hooks on modules of a block for a while; the pass ends at ``last`` if given."""
        block = self.blocks[number][1]

        def stop(_module: nn.Module, _arguments: tuple[Any, ...]) -> None:
            raise _Stop

        handles = [block.get_submodule(name).register_forward_pre_hook(hook, with_kwargs=True) for name, hook in hooks.items()]
        if last is not None:
            handles.append(block.get_submodule(last).register_forward_pre_hook(stop))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def autocast(self) -> Any:
        """The precision of matrix products, as a context."""
        return nullcontext() if self.precision is None else torch.autocast(self.device.type, dtype=self.precision)

    def kept(self, batch: int, vectors: Tensor) -> Tensor:
        """Vectors (rows, length, n) of positions that are not padding: (tokens, n)."""
        mask = self.masks[batch]
        if mask is not None and mask.shape == vectors.shape[:-1]:
            return vectors[mask]
        return vectors.reshape(-1, vectors.shape[-1])

    def groups(self, number: int, names: Sequence[str]) -> list[list[str]]:
        """The given modules of a block by shared input, in the order in which they are reached. A tensor that was changed in
        place between two of them is another input.

        Raises:
            TargetError: a module that the block does not call.
        """
        found: list[tuple[Tensor, int, list[str]]] = []

        def note(name: str) -> Hook:
            def hook(_module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
                given = arguments[0] if arguments else next(iter(keywords.values()))
                for tensor, version, members in found:
                    if tensor is given and version == given._version:
                        members.append(name)
                        return
                found.append((given, given._version, [name]))

            return hook

        with torch.no_grad(), self.listening(number, {name: note(name) for name in names}):
            self.run(number, 0, self.states[0])
        reached = {name for _, _, members in found for name in members}
        if reached != set(names):
            raise TargetError(f"block {self.blocks[number][0]!r} does not call {sorted(set(names) - reached)}")
        return [members for _, _, members in found]


def _without_cache(value: Any) -> Any:
    """An argument of a block, or None in place of a key-value cache, which would grow at each run."""
    return None if hasattr(value, "get_seq_length") else value
