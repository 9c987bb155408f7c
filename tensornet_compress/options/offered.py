"""What is offered: families of networks, the number formats of their cores, and the forms that need no search."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import log, prod
from typing import Literal

import torch
from torch import Tensor

from tensornet_compress.coding import FloatFormat, IntFormat, NamedFormat, PivotFormat
from tensornet_compress.errors import TensorNetError
from tensornet_compress.tensor import Layout, Tensorization, Topology, choose_radices

Family = Literal["dense", "svd", "residual", "tt", "ttm", "tree", "searched", "sorted"]
FAMILIES: tuple[Family, ...] = ("dense", "svd", "residual", "tt", "ttm", "tree", "searched", "sorted")
"""What a layer of a model may become."""
STEPPED_FAMILIES = FAMILIES[:-1]
"""Those whose cores take the number formats that are asked for."""
# fmt: off
DENSE_FORMATS = (
    "int2g0o", "int2g256o", "int2g128o", "int2g64z", "int3g0o", "int3g256z", "int3g128z", "int3g64z", "int4g128z", "int4g64z",
    "int4g32o", "int5g64z", "int6g64z", "int7g64z", "int8g0", "int8g128", "int8g64", "bf16", "fp32",
)
# fmt: on
CORE_FORMATS = ("int4g64z", "int8g64", "bf16", "bf16p")

FORMATS_OF_EXPORTS = {
    "compressed-tensors": ("int4g32", "int4g64", "int4g128", "int8g0", "int8g128", "bf16"),
    "gguf": ("int4g32", "int4g32o", "int5g32", "int5g32o", "int8g32", "bf16"),
}
"""Names for all formats of dense layers that ``export`` writes to a target without loss."""

SearchFamily = Literal["dense", "svd", "cut", "tt", "ttm", "tree"]
SEARCH_FAMILIES: tuple[SearchFamily, ...] = ("dense", "svd", "cut", "tt", "ttm", "tree")
"""What the search of one tensor looks at."""
SEARCH_DENSE_FORMATS = ("int2g64z", "int3g64z", "int4g64z", "int5g64z", "int6g64z", "int8g64", "bf16", "fp16", "fp32")
SEARCH_CORE_FORMATS = ("int4g64z", "int6g64z", "int8g64", "bf16", "fp16", "fp32")

_NEAR, _FAR = 1e5, 1e15
_FINE_NUMBERS = 1 << 14
_MANY_AXES = 5
_PADDED = 0.1
_NATIVE_PARTS = 2


def formats_named(formats: str | Sequence[str] | None, method: str) -> tuple[Sequence[str] | None, str]:
    """Formats and method as they were given, or those that a target of ``export`` stands for.

    Raises:
        TensorNetError: an unknown target, or a method whose networks it does not hold.
    """
    if not isinstance(formats, str):
        return formats, method
    if formats not in FORMATS_OF_EXPORTS or method not in ("auto", "dense"):
        raise TensorNetError(
            f"formats={formats!r} with method {method!r}: give a list of names, or one of {list(FORMATS_OF_EXPORTS)} with "
            "method 'dense'"
        )
    return FORMATS_OF_EXPORTS[formats], "dense"


def peak_of(tensor: Tensor) -> float:
    """The largest magnitude of the entries; 0 where there are none."""
    return max(map(abs, map(float, torch.aminmax(tensor)))) if tensor.numel() else 0.0


def reaching(fmt: NamedFormat, peak: float) -> NamedFormat:
    """The format, with bf16 scales where fp16 ones do not reach numbers of up to this size."""
    if not isinstance(fmt, IntFormat) or fmt.scale_dtype != "fp16" or peak == 0 or 1 / _NEAR <= peak <= _NEAR:
        return fmt
    return IntFormat.model_validate(fmt.model_dump() | {"scale_dtype": "bf16"})


def in_reach(peak: float, formats: Sequence[NamedFormat]) -> tuple[list[NamedFormat], str]:
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
    kept: list[NamedFormat] = [fmt for fmt in formats if isinstance(fmt, FloatFormat) and fmt.dtype != "fp16"]
    if not kept:
        names = ", ".join(fmt.name for fmt in formats)
        raise TensorNetError(f"the largest entry is {peak:.3g}, out of reach of {names}; rescale, or allow bf16 or fp32")
    left = "formats with 16-bit scales do not reach it and were left out; rescale the tensor to use them"
    return kept, f"; the largest entry is {peak:.3g}: {left}"


def fine_digits(shape: Sequence[int]) -> Tensorization:
    """The finest digits that a search makes networks of: about 2 for small tensors, about 4 for large ones; axes of a tensor
    with many axes stay whole. Coarser digits need no networks of their own: cores that share a bond of full rank are merged."""
    radix = 2 if prod(shape) <= _FINE_NUMBERS else 4
    radices = [
        (size,)
        if len(shape) > _MANY_AXES or size < 2 * radix
        else choose_radices(size, max(1, round(log(size) / log(radix))), _PADDED)
        for size in shape
    ]
    return Tensorization(shape=tuple(shape), radices=tuple(radices))


def native_topologies(tensorization: Tensorization, families: Sequence[str]) -> Iterator[tuple[str, Topology]]:
    """The usual tensor formats over the digits in native order, each with its family.

    ``svd``: two cores, cut between axes; ``tt``: a train; ``ttm``: a train of (row digit, column digit) pairs, matched from the
    least significant ones, what is left of the longer list first; ``tree``: the balanced binary tree.
    """
    count = len(tensorization.modes)
    axes = [[m for m, owner in enumerate(tensorization.mode_axes) if owner == a] for a in range(len(tensorization.shape))]
    if "svd" in families:
        for cut in range(1, len(axes)):
            yield "svd", Topology.two_cores(count, [mode for axis in axes[:cut] for mode in axis])
    if count < 2:
        return
    if "tt" in families:
        yield "tt", Topology.train(count)
    if "ttm" in families and len(axes) == 2:
        longer, shorter = sorted(axes, key=len, reverse=True)
        extra = len(longer) - len(shorter)
        pairs = [tuple(sorted(pair)) for pair in zip(longer[extra:], shorter)]
        yield "ttm", Topology.train([*((mode,) for mode in longer[:extra]), *pairs])
    if "tree" in families and count > 2:
        yield "tree", Topology.balanced_tree(range(count))


def native_layout(shape: tuple[int, ...], family: Family) -> tuple[Layout, Topology] | None:
    """The unsearched layout and topology of a layer in a tensor format, see ``native_topologies``: two digits for each axis of
    a matrix, whole axes of other tensors. None where it makes no sense, and for other families."""
    if family not in ("tt", "ttm", "tree"):
        return None
    layout = Layout.native(shape)
    if len(shape) == 2:
        layout = Layout.of(tuple(choose_radices(size, _NATIVE_PARTS) for size in shape), shape=shape)
    digits = [len(radices) for radices in layout.tensorization.radices]
    if family == "ttm" and (len(digits) != 2 or digits[0] != digits[1] or digits[0] < 2):
        return None
    topologies = dict(native_topologies(layout.tensorization, [family]))
    return layout, topologies.get(family, Topology.train(sum(digits)))
