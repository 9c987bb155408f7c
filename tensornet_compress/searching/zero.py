"""A tensor of zeros: nothing is to be searched, and one rank stands for all entries."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from tensornet_compress.coding import NumberFormat
from tensornet_compress.options.offered import SearchFamily
from tensornet_compress.searching.shapes import native_shapes
from tensornet_compress.tensor import Tensorization, TermSpec


def zero_terms(
    tensor: Tensor, families: Sequence[SearchFamily], formats: Sequence[NumberFormat]
) -> Iterator[tuple[str, TermSpec]]:
    """Every native form of the whole axes with rank 1, in every format."""
    for form in native_shapes(Tensorization.native(tuple(tensor.shape)), families):
        layout, topology = form.laid_out()
        for fmt in formats:
            ranks, kinds = (1,) * len(topology.edges), (fmt,) * len(topology.legs)
            yield form.family, TermSpec(layout=layout, topology=topology, ranks=ranks, formats=kinds)
