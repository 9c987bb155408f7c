"""Splitting those modules of a model that are to be compressed, and making computed weights plain.

What takes a module's place is compared with it on a small input first; where they differ, the module stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn

from tensornet_compress.nn.kinds import module_kind
from tensornet_compress.nn.module import NetworkModule
from tensornet_compress.nn.split import SplitModule
from tensornet_compress.nn.splits import split_of
from tensornet_compress.nn.targets import matches, require_changeable

P = ParamSpec("P")
R = TypeVar("R")


def on_layers(compress: Callable[P, R]) -> Callable[P, R]:
    """For what compresses the layers of a model, its first argument: modules with matrices that ``targets`` ask for are split
    first, and put back if it fails or if none of their layers became a network."""

    @wraps(compress)
    def wrapped(*arguments: P.args, **options: P.kwargs) -> R:
        model: Any = arguments[0] if arguments else options["model"]
        require_changeable(model)
        targets, ignore = options.get("targets"), options.get("ignore", ())
        tables = options.get("method", "auto") in ("auto", "coded")
        originals = split_modules(model, targets, ignore, tables)  # type: ignore[arg-type]
        done = False
        try:
            result = compress(*arguments, **options)
            done = True
            return result
        finally:
            for name, original in originals.items():
                made = model.get_submodule(name)
                if not done or not any(isinstance(part, NetworkModule) for part in made.modules()):
                    _put(model, name, original)

    return wrapped


def split_modules(model: nn.Module, targets: Sequence[str] | None, ignore: Sequence[str], tables: bool) -> dict[str, nn.Module]:
    """Split, in place, the modules that hold a layer to compress; gives the originals by name.

    Arguments as for ``find_targets``; a pattern may name the module or its layers.
    """

    def wanted(owner: str, name: str, kind: str) -> bool:
        names = (owner, name)
        if any(matches(pattern, one) for pattern in ignore for one in names):
            return False
        if targets is None:
            return tables or kind != "embedding"
        return any(matches(pattern, one) for pattern in targets for one in names)

    originals: dict[str, nn.Module] = {}
    made_of: dict[nn.Module, nn.Module | None] = {}
    for owner, module in list(model.named_modules(remove_duplicate=False)):
        if module not in made_of:
            made = split_of(module)
            names = [] if made is None else [(f"{owner}.{name}".strip("."), kind) for name, kind in _layers(made)]
            chosen = owner != "" and any(wanted(owner, *named) for named in names)
            made_of[module] = made if chosen and made is not None and _alike(module, made) else None
        if (other := made_of[module]) is not None:
            originals[owner] = module
            _put(model, owner, other)
    return originals


def split_for(model: nn.Module, names: Iterable[str]) -> None:
    """Split, in place, the modules of a model whose layers are named but not there, and make computed weights plain."""
    for name in names:
        parts = name.split(".")
        for depth in range(1, len(parts) + 1):
            owner = ".".join(parts[:depth])
            try:
                module = model.get_submodule(owner)
            except AttributeError:
                break
            if (made := split_of(module)) is not None:
                _put(model, owner, made)


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    model.get_submodule(parent)._modules[child] = module


def _layers(made: nn.Module) -> list[tuple[str, str]]:
    """Names and kinds of the layers of what takes a module's place."""
    return [(name, kind) for name, part in made.named_modules() if (kind := module_kind(part)) is not None]


@torch.no_grad()
def _alike(original: nn.Module, made: nn.Module) -> bool:
    """Whether a module gives the same as the one that it is to replace, up to rounding; nothing runs on the meta device, and
    plain twins have the very weight."""
    if not isinstance(made, SplitModule) or any(parameter.is_meta for parameter in original.parameters()):
        return True
    mode = original.training
    try:
        for given in made.probe(original.eval()):
            results = [_tensors(module(*given)) for module in (original, made.eval())]
            for one, other in zip(*results, strict=True):
                close = (8 if one.dtype in (torch.float16, torch.bfloat16) else 200) * torch.finfo(one.dtype).eps
                gap, scale = (one.double() - other.double()).abs().max(), one.double().abs().max()
                if one.shape != other.shape or not gap <= close * (scale + 1e-12):
                    return False
    except Exception:  # whatever a stranger's forward wants beside its input
        return False
    finally:
        original.train(mode), made.train(mode)
    return True


def _tensors(result: Any) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result]
    return [tensor for part in result for tensor in _tensors(part)] if isinstance(result, tuple) else []
