"""Which modules of a model are compressed: patterns, strict matching, and a reason for every layer left alone."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from tensornet_compress.errors import TargetError


@dataclass(frozen=True)
class Target:
    """A module to compress: its name, its kind and the names of modules tied to it."""

    name: str
    kind: str
    tied: tuple[str, ...] = ()


@dataclass(frozen=True)
class Skipped:
    """A layer that stays as it is, and why."""

    name: str
    kind: str
    reason: str


def module_kind(module: nn.Module) -> str | None:
    """``linear``, ``conv1d``, ``conv2d``, ``embedding``, or None when the module cannot hold a network."""
    if type(module) is nn.Linear:
        return "linear"
    if type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils":
        return "conv1d"
    if type(module) is nn.Conv2d:
        return "conv2d"
    if type(module) is nn.Embedding:
        return "embedding"
    return None


def turned(weight: Tensor, kind: str | None) -> Tensor:
    """A weight outputs first as a module of a kind keeps it, or the other way round: Conv1D keeps (in, out), all others keep
    outputs first."""
    return weight.T if kind == "conv1d" else weight


def layer_weight(module: nn.Module) -> Tensor:
    """The weight as the network sees it, outputs first: (out, in), (out, in, h, w) or (count, width)."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return turned(weight.detach(), module_kind(module))


def find_targets(
    model: nn.Module, targets: Sequence[str] | None = None, ignore: Sequence[str] = (), tables: bool = False
) -> tuple[list[Target], list[Skipped]]:
    """Modules to compress and modules left alone, in model order.

    Without ``targets`` these are all linear, Conv1D and Conv2d layers but the output head and whatever is tied to an
    embedding; with ``tables`` these too. A pattern is a glob on the full name or on a suffix of it (``*.q_proj``,
    ``lm_head``), or ``re:`` and a regular expression. Modules that share one weight are one target.

    Raises:
        TargetError: a pattern that matches no compressible module, with the nearest names; or nothing is left to compress.
    """
    modules = model.named_modules(remove_duplicate=False)
    kinds = {name: kind for name, module in modules if (kind := module_kind(module)) is not None}
    for pattern in (*(targets or ()), *ignore):
        _require_match(pattern, kinds)
    heads = _output_heads(model)
    tied = _tied_groups(model, kinds)
    if tables and targets is None:
        targets = ("*",)
    chosen: list[Target] = []
    skipped: list[Skipped] = []
    for name, kind in kinds.items():
        reason = _reason_to_skip(model, name, kind, targets, ignore, heads)
        if reason is None and name in tied and tied[name][0] != name:
            first = tied[name][0]
            if _reason_to_skip(model, first, kinds[first], targets, ignore, heads) is None:
                continue
            reason = f"shares its weight with {first!r}, which is not a target; name both"
        if reason is None:
            chosen.append(Target(name, kind, tuple(other for other in tied.get(name, ())[1:])))
        else:
            skipped.append(Skipped(name, kind, reason))
    if not chosen:
        raise TargetError(f"nothing to compress: {len(kinds)} layers, all skipped (first: {skipped[:1]})")
    return chosen, skipped


def _reason_to_skip(
    model: nn.Module, name: str, kind: str, targets: Sequence[str] | None, ignore: Sequence[str], heads: set[str]
) -> str | None:
    if any(_matches(pattern, name) for pattern in ignore):
        return "matched by ignore"
    if targets is not None and not any(_matches(pattern, name) for pattern in targets):
        return "not matched by targets"
    if targets is None and kind == "embedding":
        return "embeddings are compressed only when named in targets"
    if targets is None and name in heads:
        return "the output head is compressed only when named in targets"
    module = model.get_submodule(name)
    weight = layer_weight(module)
    if weight.is_meta:
        return "its weight is on the meta device; load it first"
    if not weight.is_floating_point():
        return f"its weight is {weight.dtype}, not floating point"
    if weight.numel() == 0:
        return "its weight is empty"
    if getattr(module, "max_norm", None) is not None:
        return "max_norm rewrites the table at run time"
    if getattr(module, "padding_mode", "zeros") != "zeros":
        return f"padding_mode {module.padding_mode!r} is not supported"
    if not torch.isfinite(weight).all():
        raise TargetError(f"the weight of {name!r} holds NaN or infinite entries; repair the model, or ignore that module")
    return None


def _matches(pattern: str, name: str) -> bool:
    if pattern.startswith("re:"):
        return re.search(pattern[3:], name) is not None
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")


def _require_match(pattern: str, kinds: dict[str, str]) -> None:
    if pattern.startswith("re:"):
        try:
            re.compile(pattern[3:])
        except re.error as error:
            raise TargetError(f"pattern {pattern!r} is not a regular expression: {error}") from error
    if any(_matches(pattern, name) for name in kinds):
        return
    endings = {name.rsplit(".", 1)[-1] for name in kinds}
    near = difflib.get_close_matches(pattern, sorted(endings | set(kinds)), n=4, cutoff=0.3)
    raise TargetError(f"pattern {pattern!r} matches no compressible module; nearest names: {near or sorted(endings)[:8]}")


def _output_heads(model: nn.Module) -> set[str]:
    getter = getattr(model, "get_output_embeddings", None)
    head = getter() if callable(getter) else None
    return {name for name, module in model.named_modules() if head is not None and module is head}


def _tied_groups(model: nn.Module, kinds: dict[str, str]) -> dict[str, tuple[str, ...]]:
    """Name -> all names that share its weight (first in model order first), for weights with more than one owner."""
    owners: dict[tuple[object, ...], list[str]] = {}
    for name in kinds:
        weight = layer_weight(model.get_submodule(name))
        key = (id(model.get_submodule(name)),) if weight.is_meta else (weight.data_ptr(), tuple(weight.shape))
        owners.setdefault(key, []).append(name)
    return {name: tuple(names) for names in owners.values() if len(names) > 1 for name in names}
