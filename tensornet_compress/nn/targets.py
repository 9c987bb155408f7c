"""Which modules of a model are compressed: patterns, strict matching, and a reason for every matrix left alone."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from tensornet_compress.errors import TargetError
from tensornet_compress.nn.finite import all_finite
from tensornet_compress.nn.kinds import FLOATS, HOLDERS, KINDS, identity, layer_weight, module_kind
from tensornet_compress.nn.module import NetworkModule
from tensornet_compress.nn.split import SplitModule
from tensornet_compress.nn.splits import split_kind


@dataclass(frozen=True)
class Target:
    """A module to compress: its name, its kind and the names of modules tied to it."""

    name: str
    kind: str
    tied: tuple[str, ...] = ()


@dataclass(frozen=True)
class Skipped:
    """A module that stays as it is, why, and the bytes of its own parameters."""

    name: str
    kind: str
    reason: str
    nbytes: int = 0


def find_targets(
    model: nn.Module, targets: Sequence[str] | None = None, ignore: Sequence[str] = (), tables: bool = False
) -> tuple[list[Target], list[Skipped]]:
    """Modules to compress and modules left alone, in model order.

    Without ``targets`` these are all linear layers and convolutions but the output head and whatever is tied to an
    embedding; with ``tables`` these too. A pattern is a glob on the full name or on a suffix of it (``*.q_proj``,
    ``lm_head``), or ``re:`` and a regular expression. Modules that share one weight are one target. Every other module that
    owns a matrix or a larger tensor is among those left alone; vectors (norms, biases) are never compressed and not listed.

    Raises:
        TargetError: a pattern that matches no compressible module, with the nearest names; or nothing is left to compress.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    kinds = {name: kind for name, module in modules.items() if (kind := module_kind(module)) is not None}
    others = {name: reason for name, module in modules.items() if name not in kinds and (reason := _unsupported(name, module))}
    splits = [name for name, module in modules.items() if isinstance(module, SplitModule)]
    for pattern in targets or ():
        _require_match(pattern, [*kinds, *splits], others)
    for pattern in ignore:
        _require_match(pattern, [*kinds, *splits, *others], {})
    if tables and targets is None:
        targets = ("*",)
    choice = _Choice(model, kinds, targets, ignore)
    chosen: list[Target] = []
    skipped: list[Skipped] = []
    for name, module in modules.items():
        if name in others:
            skipped.append(Skipped(name, type(module).__name__, others[name], _own_nbytes(module)))
        if name not in kinds:
            continue
        reason = choice.reason_to_skip(name)
        first, *tied = choice.groups.get(name, [name])
        if reason is None and first != name:
            if choice.reason_to_skip(first) is None:
                continue
            reason = f"shares its weight with {first!r}, which is not a target; name both"
        if reason is None:
            chosen.append(Target(name, kinds[name], tuple(tied)))
        else:
            skipped.append(Skipped(name, kinds[name], reason, _own_nbytes(module)))
    if not chosen:
        reasons: dict[str, list[str]] = {}
        for skip in skipped:
            reasons.setdefault(skip.reason, []).append(skip.name)
        told = "; ".join(f"{len(names)} layers ({names[0]!r} first): {reason}" for reason, names in reasons.items())
        raise TargetError(f"nothing to compress: {len(skipped)} layers, all skipped: {told or 'the model has none'}")
    return chosen, skipped


class _Choice:
    """What the caller wants compressed, and the reasons against it."""

    def __init__(self, model: nn.Module, kinds: dict[str, str], targets: Sequence[str] | None, ignore: Sequence[str]):
        self.model, self.kinds, self.targets, self.ignore = model, kinds, targets, ignore
        getter = getattr(model, "get_output_embeddings", None)
        head = getter() if callable(getter) else None
        self.heads = {name for name, module in model.named_modules() if head is not None and module is head}
        owners: dict[tuple[Any, ...], list[str]] = {}
        for name in kinds:
            module = model.get_submodule(name)
            # A computed weight lies at an address that may be used again.
            key = identity(layer_weight(module)) if "weight" in module._parameters else (name,)
            owners.setdefault(key, []).append(name)
        # Name -> all names that share its weight, the first in model order first.
        self.groups = {name: names for names in owners.values() for name in names}
        self.strangers = list(_matrices_elsewhere(model, kinds))

    def reason_to_skip(self, name: str) -> str | None:
        """Why a module stays as it is, ties to other targets left out of account.

        Raises:
            TargetError: it would be compressed, but its weight is not finite.
        """
        if self._named(self.ignore, name):
            return "matched by ignore"
        if self.targets is not None and not self._named(self.targets, name):
            return "not matched by targets"
        if self.targets is None and self.kinds[name] == "embedding":
            return "embeddings are compressed only when named in targets"
        if self.targets is None and name in self.heads:
            return "the output head is compressed only when named in targets"
        module = self.model.get_submodule(name)
        reason = _unusable(self.model, name, module) or self._held_elsewhere(layer_weight(module))
        if reason is None and not all_finite(layer_weight(module)):
            raise TargetError(f"the weight of {name!r} holds NaN or infinite entries; repair the model, or ignore that module")
        return reason

    def _named(self, patterns: Sequence[str], name: str) -> bool:
        """Whether a pattern is for a layer, or for the module that it was split from."""
        parts = name.split(".")
        owners = (".".join(parts[:depth]) for depth in range(1, len(parts)))
        names = [name, *(owner for owner in owners if isinstance(self.model.get_submodule(owner), SplitModule))]
        return any(matches(pattern, one) for pattern in patterns for one in names)

    def _held_elsewhere(self, weight: Tensor) -> str | None:
        """Memory that a module without a network goes on holding would not become smaller."""
        for place, owner, tensor in self.strangers:
            if _overlap(weight, tensor):
                return f"shares its weight with {place!r} of a {owner}, which cannot hold a network"
        return None


def require_changeable(model: nn.Module) -> None:
    """Refuse a model whose layers cannot be replaced.

    Raises:
        TargetError: it is one; the message says what to do.
    """
    if isinstance(model, torch.jit.ScriptModule):
        raise TargetError("a scripted or traced module cannot be changed; compress the model that it was made from")
    for name, parameter in model.named_parameters():
        if isinstance(parameter, UninitializedParameter):
            raise TargetError(f"{name!r} has no shape yet (a lazy module); call the model once first")
        if parameter.is_inference():
            raise TargetError(
                f"{name!r} was made under torch.inference_mode, and takes no gradients; make the model outside of it"
            )


def _unusable(model: nn.Module, name: str, module: nn.Module) -> str | None:
    """Why a module of a compressible kind cannot be compressed."""
    weight = layer_weight(module)
    if "weight" not in module._parameters:
        return (
            "its weight is computed from other parameters (weight_norm or another parametrisation); make it a parameter first, "
            "by torch.nn.utils.remove_weight_norm or torch.nn.utils.parametrize.remove_parametrizations"
        )
    if isinstance(model.get_submodule(name.rpartition(".")[0]), nn.MultiheadAttention):
        return "nn.MultiheadAttention reads its weight without calling it"
    if weight.is_meta:
        return (
            "its weight is not in memory (offloaded, or on the meta device); load the model without device_map, or compress "
            "its folder with tnc.compress_folder"
        )
    if "forward" in module.__dict__:
        return "its forward was replaced on the instance (a patch, or a hook of accelerate); take that off first"
    if type(module).__module__.startswith("torch.nn.modules.") and module._buffers:
        return f"it holds buffers of its own ({', '.join(module._buffers)})"
    if weight.layout is not torch.strided:
        return f"its weight is {weight.layout}; make it dense first"
    if not weight.is_floating_point():
        return f"its weight is {weight.dtype}, not floating point"
    if weight.dtype not in FLOATS:
        return f"its weight is {weight.dtype}; convert it to bfloat16, float16, float32 or float64 first"
    if weight.numel() == 0:
        return "its weight is empty"
    if getattr(module, "max_norm", None) is not None:
        return "max_norm rewrites the table at run time"
    if getattr(module, "padding_mode", "zeros") != "zeros":
        return f"padding_mode {module.padding_mode!r} is not supported"
    if getattr(module, "transposed", False) and getattr(module, "groups", 1) != 1:
        return "a transposed convolution in groups is not supported"
    return None


def _unsupported(name: str, module: nn.Module) -> str | None:
    """Why a module that is of no compressible kind is left alone; None if it owns no matrix."""
    held = {key: tensor for key, tensor in module._parameters.items() if tensor is not None and tensor.ndim >= 2}
    if not held or "parametrizations" in name.split("."):
        return None
    named = f"{', '.join(held)} ({sum(tensor.numel() * tensor.element_size() for tensor in held.values()):,} bytes)"
    if isinstance(module, NetworkModule):
        return f"{named}: it is a network already"
    if split_kind(module) is not None:
        return f"{named}: targets want none of the layers that a {type(module).__name__} can be split into, or it computes more"
    base = next((base for base, _ in KINDS if isinstance(module, base)), None)
    if base is not None:
        return f"{named}: {type(module).__name__} computes something else than nn.{base.__name__}"
    return f"{named}: a {type(module).__name__} cannot hold a network; {HOLDERS} can"


def _own_nbytes(module: nn.Module) -> int:
    return sum(part.numel() * part.element_size() for part in module._parameters.values() if part is not None)


def _matrices_elsewhere(model: nn.Module, kinds: dict[str, str]) -> Iterator[tuple[str, str, Tensor]]:
    """Name, class of the owner, and tensor of every matrix that is not the weight of a compressible module."""
    for name, module in model.named_modules(remove_duplicate=False):
        for key, tensor in module._parameters.items():
            if tensor is not None and tensor.ndim >= 2 and not (name in kinds and key == "weight"):
                yield f"{name}.{key}".lstrip("."), type(module).__name__, tensor


def _overlap(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have memory in common."""
    if one.layout is not torch.strided or other.layout is not torch.strided or not (one.numel() and other.numel()):
        return False
    if one.untyped_storage()._cdata != other.untyped_storage()._cdata and one.data_ptr() != other.data_ptr():
        return False
    if one.is_meta or other.is_meta:
        return one.untyped_storage()._cdata == other.untyped_storage()._cdata
    (a, b), (c, d) = _span(one), _span(other)
    return a < d and c < b


def _span(tensor: Tensor) -> tuple[int, int]:
    """First byte, and the one behind the last."""
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride())) + 1
    return tensor.data_ptr(), tensor.data_ptr() + reach * tensor.element_size()


def matches(pattern: str, name: str) -> bool:
    """Whether a pattern, see ``find_targets``, is for a name."""
    if pattern.startswith("re:"):
        return re.search(pattern[3:], name) is not None
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")


def _require_match(pattern: str, names: Sequence[str] | dict[str, str], unsupported: dict[str, str]) -> None:
    if pattern.startswith("re:"):
        try:
            re.compile(pattern[3:])
        except re.error as error:
            raise TargetError(f"pattern {pattern!r} is not a regular expression: {error}") from error
    if any(matches(pattern, name) for name in names):
        return
    for name, reason in unsupported.items():
        if matches(pattern, name):
            raise TargetError(f"pattern {pattern!r} matches no compressible module; {name!r} is left alone: {reason}")
    endings = {name.rsplit(".", 1)[-1] for name in names}
    near = difflib.get_close_matches(pattern, sorted(endings | set(names)), n=4, cutoff=0.3)
    raise TargetError(f"pattern {pattern!r} matches no compressible module; nearest names: {near or sorted(endings)[:8]}")
