"""The repeated blocks of a model: where they are, running one by itself, and running the model with some of them replayed.

Only the states at one border between blocks are held, so that work on one block needs memory for one block, whatever the depth.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tensornet_compress.calibrate.batches import Batch, call, model_inputs, without_padding
from tensornet_compress.calibrate.hooks import autocast, before_call, evaluating, hooked
from tensornet_compress.errors import TargetError, TensorNetError

Blocks = list[tuple[str, nn.Module]]
# Sees what a module is given.
Hook = Callable[[Tensor], None]


class EndOfPass(Exception):  # noqa: N818
    """Ends a forward pass whose rest is not needed."""


def block_list(model: nn.Module, names: Sequence[str]) -> Blocks:
    """Names and modules of the entries of the ``ModuleList`` that holds most of the named modules; empty without one."""
    best: Blocks = []
    most = 0
    for prefix, module in model.named_modules():
        if isinstance(module, nn.ModuleList):
            held = sum(name.startswith(f"{prefix}.") for name in names)
            if held > most:
                most, best = held, [(f"{prefix}.{i}", block) for i, block in enumerate(module)]
    return best


def find_blocks(model: nn.Module, names: Sequence[str]) -> Blocks:
    """``block_list`` of a model that must have one.

    Raises:
        TargetError: no list holds any of the named modules.
    """
    blocks = block_list(model, names)
    if not blocks:
        raise TargetError(f"{type(model).__name__} holds none of {list(names)[:3]} in a list of blocks")
    return blocks


@contextmanager
def replaced_forwards(blocks: Blocks, make: Callable[[int, nn.Module], Any]) -> Iterator[None]:
    """Block ``number`` runs ``make(number, block)`` in place of its forward inside the context."""
    changed = []
    try:
        for number, (_, block) in enumerate(blocks):
            changed.append((block, block.__dict__.get("forward")))
            block.__dict__["forward"] = make(number, block)
        yield
    finally:
        for block, before in changed:
            if before is None:
                block.__dict__.pop("forward", None)
            else:
                block.__dict__["forward"] = before


def without_cache(arguments: tuple[Any, ...], keywords: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of a block without a key-value cache, which would grow each time that the block runs again."""

    def plain(value: Any) -> Any:
        return None if hasattr(value, "get_seq_length") else value

    named = {name: plain(value) for name, value in keywords.items()}
    if "use_cache" in named:
        named["use_cache"] = False
    return tuple(map(plain, arguments)), named


class Border:
    """Outputs of one block for every batch, given back in place of running the blocks up to it."""

    def __init__(self, blocks: Blocks):
        self.blocks = blocks
        self._number = -1
        self._states: list[Any] = []

    @contextmanager
    def moved(self, number: int, batches: int, stop: bool) -> Iterator[None]:
        """Inside, blocks before the border are replayed while the model runs over all batches, and the outputs of block
        ``number`` are noted; a pass ends there if ``stop``. Behind the context the border lies behind that block.

        Raises:
            TensorNetError: the block did not run once per batch.
        """
        noted: list[Any] = []
        waiting = iter(self._states)
        current: list[Any] = []

        def replay(position: int, _block: nn.Module) -> Callable[..., Any]:
            def forward(*_arguments: Any, **_keywords: Any) -> Any:
                if position == 0:
                    current[:] = [next(waiting, None)]
                return current[0]

            return forward

        def note(_module: nn.Module, _arguments: tuple[Any, ...], output: Any) -> None:
            noted.append(_detached(output))
            if stop:
                raise EndOfPass

        name, block = self.blocks[number]
        with ExitStack() as stack:
            stack.enter_context(replaced_forwards(self.blocks[: self._number + 1], replay))
            stack.enter_context(hooked([block.register_forward_hook(note)]))
            yield
        if len(noted) != batches:
            raise TensorNetError(
                f"block {name!r} ran {len(noted)} times for {batches} batches; statistics by block need every block to run "
                "once per batch"
            )
        self._number, self._states = number, noted


def _detached(output: Any) -> Any:
    if isinstance(output, Tensor):
        return output.detach()
    return tuple(_detached(part) for part in output) if isinstance(output, tuple) else output


class BlockRunner:
    """The blocks of a model, the states that enter the first one, and each block's other arguments.

    Args:
        model: a model whose layers lie in one ``nn.ModuleList``, each taking hidden states (rows, length, width) first and
            giving them back (alone, or first in a tuple), such as the decoders and encoders of transformers.
        batches: ids or dicts, see ``Batch``.
        names: the modules that will be worked on; the list that holds most of them is taken.
        precision: dtype of ``torch.autocast`` for matrix products (hidden states keep the model's dtype), None for none.

    Raises:
        TargetError: no list of blocks holds the named modules.
        TensorNetError: no batches, or blocks that are not called in order.
    """

    def __init__(self, model: nn.Module, batches: Sequence[Batch], names: Sequence[str], precision: torch.dtype | None = None):
        self.blocks = find_blocks(model, names)
        self.device = next(model.parameters()).device
        self.precision = precision
        self.states: list[Tensor] = []
        self.masks: list[Tensor | None] = []
        self._calls: list[list[tuple[tuple[Any, ...], dict[str, Any]]]] = []
        self._as_tuple: list[bool] = []

        def pass_on(number: int, block: nn.Module) -> Any:
            """Blocks note their arguments and pass the states on; the last one ends the pass."""
            original = block.forward

            def forward(state: Tensor, *arguments: Any, **keywords: Any) -> Any:
                given, named = without_cache(arguments, keywords)
                if number == 0:
                    self.states.append(state)
                    if not self._as_tuple:
                        self._as_tuple.append(isinstance(original(state.clone(), *given, **named), tuple))
                self._calls[-1].append((given, named))
                if number == len(self.blocks) - 1:
                    raise EndOfPass
                return self.given_back(state)

            return forward

        with evaluating(model), torch.no_grad(), replaced_forwards(self.blocks, pass_on):
            for batch in batches:
                inputs = model_inputs(batch, self.device)
                self.masks.append(inputs.get("attention_mask"))
                self._calls.append([])
                try:
                    call(model, inputs)
                except EndOfPass:
                    continue
                raise TensorNetError(f"{type(model).__name__} did not call its blocks in order; it cannot be run by blocks")
        if not self.states:
            raise TensorNetError("calibration was given no batches")

    def given_back(self, state: Tensor) -> Any:
        """States in the form in which blocks give them."""
        return (state,) if self._as_tuple[0] else state

    def run(self, number: int, batch: int, state: Tensor) -> Tensor:
        """States (rows, length, width) after block ``number``, for the arguments of batch ``batch``; ``state`` stays what it
        is, also when the block changes what it is given in place."""
        given, named = self._calls[batch][number]
        with autocast(self.device, self.precision):
            result = self.blocks[number][1](state.clone(), *given, **named)
        output: Tensor = result[0] if isinstance(result, tuple) else result
        return output

    def outputs(self, number: int, states: Sequence[Tensor]) -> list[Tensor]:
        """States of all batches after block ``number``, without a graph."""
        with torch.no_grad():
            return [self.run(number, batch, state) for batch, state in enumerate(states)]

    def run_until(self, number: int, batch: int, state: Tensor, hooks: Mapping[str, Hook], last: str) -> None:
        """Run a block while ``hooks`` see what modules (names inside the block) are given; stop when ``last`` is reached."""
        with self.listening(number, hooks, last):
            try:
                self.run(number, batch, state)
            except EndOfPass:
                return
        raise TensorNetError(f"block {self.blocks[number][0]!r} never called its module {last!r}")

    @contextmanager
    def listening(self, number: int, hooks: Mapping[str, Hook], last: str | None = None) -> Iterator[None]:
        """Hooks on modules of a block inside the context; a pass ends at ``last`` if given."""
        block = self.blocks[number][1]

        def stop(_given: Tensor) -> None:
            raise EndOfPass

        seen = [*hooks.items(), *([(last, stop)] if last is not None else [])]
        with hooked([before_call(block.get_submodule(name), hook) for name, hook in seen]):
            yield

    def kept(self, batch: int, vectors: Tensor) -> Tensor:
        """Vectors (rows, length, n) of positions that are not padding: (tokens, n)."""
        return without_padding(vectors, self.masks[batch])

    def groups(self, number: int, names: Sequence[str]) -> list[list[str]]:
        """The given modules of a block by shared input, in the order in which they are reached. A tensor that was changed in
        place between two of them is another input.

        Raises:
            TargetError: a module that the block does not call.
        """
        groups: list[tuple[Tensor, int, list[str]]] = []

        def note(name: str) -> Hook:
            def see(given: Tensor) -> None:
                for tensor, version, members in groups:
                    if tensor is given and version == given._version:
                        members.append(name)
                        return
                groups.append((given, given._version, [name]))

            return see

        with torch.no_grad(), self.listening(number, {name: note(name) for name in names}):
            self.run(number, 0, self.states[0])
        reached = {name for _, _, members in groups for name in members}
        if reached != set(names):
            raise TargetError(f"block {self.blocks[number][0]!r} does not call {sorted(set(names) - reached)}")
        return [members for _, _, members in groups]
