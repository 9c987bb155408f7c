"""Specs: a network without its numbers, as plain data with JSON both ways."""

from __future__ import annotations

from functools import lru_cache
from math import prod
from typing import Literal, Self

import torch
from pydantic import model_validator

from tensornet_compress.coding import FloatFormat, NumberFormat, PivotFormat, SortedFormat, format_nbytes
from tensornet_compress.frozen import Frozen
from tensornet_compress.tensor.layout import Layout
from tensornet_compress.tensor.topology import Topology

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}


class TermSpec(Frozen):
    """One network of a sum: layout, topology, a rank per bond and a number format per core."""

    layout: Layout
    topology: Topology
    ranks: tuple[int, ...]
    formats: tuple[NumberFormat, ...]

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.topology.positions != len(self.layout.dims):
            raise ValueError(f"topology has {self.topology.positions} legs, the layout {len(self.layout.dims)} modes")
        if len(self.ranks) != len(self.topology.edges) or (self.ranks and min(self.ranks) < 1):
            raise ValueError(f"ranks {self.ranks} for {len(self.topology.edges)} bonds; each must be at least 1")
        if len(self.formats) != len(self.topology.legs):
            raise ValueError(f"{len(self.formats)} number formats for {len(self.topology.legs)} cores")
        for core, fmt in enumerate(self.formats):
            if isinstance(fmt, PivotFormat | SortedFormat):
                fmt.parts(self.core_shape(core))
        return self

    def sizes(self) -> dict[str, int]:
        """Size of every index label."""
        return index_sizes(self.layout.dims, self.ranks)

    def core_shape(self, core: int) -> tuple[int, ...]:
        """Shape of a core, axes as in ``Topology.core_labels``."""
        return core_shapes(self.topology, self.layout.dims, self.ranks)[core]

    @property
    def core_nbytes(self) -> tuple[int, ...]:
        """Stored bytes of each core."""
        return tuple(format_nbytes(fmt, self.core_shape(core)) for core, fmt in enumerate(self.formats))

    @property
    def nbytes(self) -> int:
        """Stored bytes: cores, scales, zero points and packed orders."""
        return sum(self.core_nbytes) + self.layout.order_nbytes

    @property
    def numbers(self) -> int:
        """Count of stored numbers (without scales and pivots): the field's 'parameters'."""
        return sum(_numbers(fmt, self.core_shape(core)) for core, fmt in enumerate(self.formats))


def index_sizes(dims: tuple[int, ...], ranks: tuple[int, ...]) -> dict[str, int]:
    """Size of every index label, see ``Topology.core_labels``."""
    positions = {f"p{position}": size for position, size in enumerate(dims)}
    return positions | {f"b{bond}": rank for bond, rank in enumerate(ranks)}


def core_shapes(topology: Topology, dims: tuple[int, ...], ranks: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    """Shapes of all cores, see ``TermSpec.core_shape``."""
    return _core_shapes(topology.all_labels, dims, ranks)


# By plain tuples, which compare several times as fast as models do.
@lru_cache(maxsize=4096)
def _core_shapes(
    labels: tuple[tuple[str, ...], ...], dims: tuple[int, ...], ranks: tuple[int, ...]
) -> tuple[tuple[int, ...], ...]:
    sizes = index_sizes(dims, ranks)
    return tuple(tuple(sizes[label] for label in core) for core in labels)


def _numbers(fmt: NumberFormat, shape: tuple[int, ...]) -> int:
    return prod(fmt.parts(shape)[""][0]) if isinstance(fmt, PivotFormat) else prod(shape)


class NetworkSpec(Frozen):
    """A sum of networks that stands for one tensor of ``shape``; ``dtype`` is what ``to_dense`` gives back.

    >>> import tensornet_compress as tnc
    >>> spec = tnc.NetworkSpec.dense((64, 32), tnc.parse_format("int4g32"))
    >>> spec.describe(), spec.nbytes
    ('64,32 int4g32', 1152)
    >>> tnc.NetworkSpec.from_json(spec.to_json()) == spec
    True
    """

    version: Literal[1] = 1
    shape: tuple[int, ...]
    dtype: Literal["float32", "float64", "bfloat16", "float16"] = "float32"
    terms: tuple[TermSpec, ...]

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.terms:
            raise ValueError("a network needs at least one term")
        for term in self.terms:
            if term.layout.shape != self.shape:
                raise ValueError(f"a term is laid out for shape {term.layout.shape}, the network has {self.shape}")
        return self

    @classmethod
    def of(cls, term: TermSpec, dtype: torch.dtype = torch.float32) -> NetworkSpec:
        """A single term; of numbers in a dtype that specs do not know, float32 is given back."""
        name = next((name for name, value in DTYPES.items() if value == dtype), "float32")
        return cls.model_validate({"shape": term.layout.shape, "dtype": name, "terms": (term,)})

    @classmethod
    def dense(cls, shape: tuple[int, ...], fmt: NumberFormat | None = None, dtype: str = "float32") -> NetworkSpec:
        """One core: the dense tensor in a number format (bf16 unless given)."""
        layout = Layout.native(shape)
        topology = Topology.one_core(len(shape))
        term = TermSpec(layout=layout, topology=topology, ranks=(), formats=(fmt or FloatFormat(),))
        return cls.model_validate({"shape": shape, "dtype": dtype, "terms": (term,)})

    @property
    def nbytes(self) -> int:
        """Stored bytes of all terms."""
        return sum(term.nbytes for term in self.terms)

    @property
    def is_dense(self) -> bool:
        """True for a single core."""
        return len(self.terms) == 1 and len(self.terms[0].formats) == 1

    def describe(self) -> str:
        """One short line, e.g. ``2 cores 576|576 r=64 int4g64``."""
        parts = []
        for term in self.terms:
            names = "/".join(dict.fromkeys(fmt.name for fmt in term.formats))
            legs = "|".join(",".join(str(term.layout.dims[p]) for p in legs) or "." for legs in term.topology.legs)
            ranks = f" r={','.join(map(str, term.ranks))}" if term.ranks else ""
            parts.append(f"{legs}{ranks} {names}")
        return " + ".join(parts)
