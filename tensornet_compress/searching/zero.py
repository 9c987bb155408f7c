"""A tensor of zeros: nothing is to be searched, and one rank stands for all entries."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from tensornet_compress.layout import Tensorization
from tensornet_compress.network import NumberFormat, TermSpec
from tensornet_compress.searching.shapes import Family, native_shapes


def zero_terms(tensor: Tensor, families: Sequence[Family], formats: Sequence[NumberFormat]) -> Iterator[tuple[str, TermSpec]]:
    """Every native form of the whole axes with rank 1, in every format."""
    for form in native_shapes(Tensorization.native(tuple(tensor.shape)), families):
        layout, topology = form.laid_out()
        for fmt in formats:
            ranks, kinds = (1,) * len(topology.edges), (fmt,) * len(topology.legs)
            yield form.family, TermSpec(layout=layout, topology=topology, ranks=ranks, formats=kinds)
