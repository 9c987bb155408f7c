"""Which number formats reach the entries of a tensor."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tensornet_compress.coding import FloatFormat, NumberFormat, PivotFormat
from tensornet_compress.errors import TensorNetError

_NEAR, _FAR = 1e5, 1e15


def peak_of(tensor: Tensor) -> float:
    """The largest magnitude of the entries; 0 where there are none."""
    return max(map(abs, map(float, torch.aminmax(tensor)))) if tensor.numel() else 0.0


def in_reach(peak: float, formats: Sequence[NumberFormat]) -> tuple[list[NumberFormat], str]:
    """The formats that can hold numbers of up to this size, and what to say of those left out (empty: none were).

    Integer formats keep fp16 scales, which do not reach far beyond 1e5 and below 1e-5.

    Raises:
        TensorNetError: a pivoted format, squares of entries that leave single precision, or no format that is left.
    """
    pivoted = [fmt.name for fmt in formats if isinstance(fmt, PivotFormat)]
    if pivoted:
        raise TensorNetError(f"{pivoted} belong to two cores of a matrix; a search takes {[name[:-1] for name in pivoted]}")
    if peak == 0.0:
        return list(formats), "; every entry is zero, so there is nothing to search"
    if 1 / _NEAR <= peak <= _NEAR:
        return list(formats), ""
    if not 1 / _FAR <= peak <= _FAR:
        raise TensorNetError(f"the largest entry is {peak:.3g}, whose square leaves single precision; rescale the tensor")
    kept: list[NumberFormat] = [fmt for fmt in formats if isinstance(fmt, FloatFormat) and fmt.dtype != "fp16"]
    if not kept:
        names = ", ".join(fmt.name for fmt in formats)
        raise TensorNetError(f"the largest entry is {peak:.3g}, out of reach of {names}; rescale, or allow bf16 or fp32")
    left = "formats with 16-bit scales do not reach it and were left out; rescale the tensor to use them"
    return kept, f"; the largest entry is {peak:.3g}: {left}"
