"""What a search is given, checked before anything slow: one clear error that quotes it."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from tensornet_compress.decompose.linalg import require_finite
from tensornet_compress.errors import TensorNetError
from tensornet_compress.metric import KroneckerMetric

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_MOST_AXES = 52


def check_names(what: str, given: Sequence[str], known: Sequence[str]) -> None:
    """All of ``given`` are ``known``; raises ``TensorNetError``."""
    if isinstance(given, str) or not isinstance(given, Sequence):
        raise TensorNetError(f"{what} takes a list of names, was given {'the string ' * isinstance(given, str)}{given!r}")
    unknown = [item for item in given if item not in known]
    if unknown:
        raise TensorNetError(f"unknown {what} {unknown}; choose from {tuple(known)}")


def check_formats(given: Sequence[str] | None) -> None:
    """A list of names, or nothing; raises ``TensorNetError``."""
    if isinstance(given, str):
        raise TensorNetError(f"formats takes a list of names, was given the string {given!r}; write [{given!r}]")
    if given is not None and not list(given):
        raise TensorNetError("formats is empty; give some, or None for all")
    if strange := [name for name in given or () if not isinstance(name, str)]:
        raise TensorNetError(f"formats takes names such as 'int4g64z', was given {strange[0]!r}")


def check_numbers(time_budget: float, seed: int) -> None:
    """A positive number of seconds and a whole seed; raises ``TensorNetError``."""
    if isinstance(time_budget, bool) or not isinstance(time_budget, Real) or not time_budget > 0:
        raise TensorNetError(f"time_budget must be a positive number of seconds, was given {time_budget!r}")
    if isinstance(seed, bool) or not isinstance(seed, Integral):
        raise TensorNetError(f"seed must be a whole number, was given {seed!r}")


def check_tensor(tensor: Tensor) -> None:
    """A finite tensor with axes; raises ``TensorNetError``."""
    if not isinstance(tensor, Tensor):
        raise TensorNetError(f"search takes a torch.Tensor, was given {type(tensor).__name__}")
    if tensor.layout != torch.strided or tensor.device.type == "meta":
        raise TensorNetError(f"search takes a dense tensor with data, was given a {tensor.layout} one on {tensor.device}")
    if tensor.is_floating_point() and tensor.dtype not in _FLOATS:
        raise TensorNetError(f"search takes 16, 32 or 64 bit floating point, was given {tensor.dtype}; convert with .float()")
    if tensor.ndim > _MOST_AXES:
        raise TensorNetError(f"search takes at most {_MOST_AXES} axes, was given {tensor.ndim}; join or squeeze some")
    require_finite(tensor, "tensor")
    if tensor.ndim == 0:
        raise TensorNetError("a tensor without axes is a single number; there is nothing to search")


def check_metric(metric: Any, tensor: Tensor) -> None:
    """None, or a metric of matrices (first axis of ``tensor``, all others); raises ``TensorNetError``."""
    if metric is None:
        return
    if not isinstance(metric, KroneckerMetric):
        raise TensorNetError(f"a search takes a KroneckerMetric, was given {metric!r}")
    sides = {"rows": (metric.rows, tensor.shape[0]), "columns": (metric.columns, prod(tensor.shape[1:]))}
    for name, (factor, size) in sides.items():
        if factor is not None and len(factor) != size:
            raise TensorNetError(
                f"the metric's {name} are of {len(factor)}, but a tensor of shape {tuple(tensor.shape)} has {size} {name} "
                "(first axis by all others)"
            )
