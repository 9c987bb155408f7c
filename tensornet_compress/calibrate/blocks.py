"""The repeated blocks of a model: where they are, and running them with other forwards for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from tensornet_compress.errors import TargetError

Blocks = list[tuple[str, nn.Module]]


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
def replaced_forwards(blocks: Sequence[tuple[str, nn.Module]], make: Callable[[int, nn.Module], Any]) -> Iterator[None]:
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
