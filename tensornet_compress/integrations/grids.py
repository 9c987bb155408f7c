"""Layers in plain integers, in the terms that other formats share: codes, zero points and scales of equal groups."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import gcd

import torch
from torch import Tensor

from tensornet_compress.coding import IntFormat
from tensornet_compress.coding.bits import unpack_bits
from tensornet_compress.coding.packed_integers import grouped_view
from tensornet_compress.tensor import TensorNetwork
from tensornet_compress.tensor.network import part_name


@dataclass(frozen=True)
class Grid:
    """A matrix (rows, columns) as ``scale * (codes - zero) + offset``.

    ``codes`` int16 (rows, columns) in 0 .. 2**bits - 1; ``scale`` (rows, groups) in the dtype it is stored in; ``zero`` int16
    (rows, groups); ``offset`` (rows, groups), None where it is nowhere needed. Groups are ``columns / groups`` wide.
    """

    bits: int
    codes: Tensor
    scale: Tensor
    zero: Tensor
    offset: Tensor | None = None

    @property
    def width(self) -> int:
        """Columns in a group."""
        return self.codes.shape[1] // self.scale.shape[1]

    def values(self) -> Tensor:
        """``codes - zero``, int16 (rows, columns)."""
        return self.codes - self.zero.repeat_interleave(self.width, 1)

    def to_dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The matrix as a reader computes it in a dtype, to which scales are rounded first."""
        dense = self.values().to(dtype) * self.scale.to(dtype).repeat_interleave(self.width, 1)
        return dense if self.offset is None else dense + self.offset.to(dtype).repeat_interleave(self.width, 1)

    def regrouped(self, width: int) -> Grid:
        """The same numbers in groups of ``width``, which divides the own width."""
        times = self.width // width
        scale, zero = (part.repeat_interleave(times, 1) for part in (self.scale, self.zero))
        offset = None if self.offset is None else self.offset.repeat_interleave(times, 1)
        return replace(self, scale=scale, zero=zero, offset=offset)

    def symmetric(self, bits: int) -> Grid:
        """The same numbers on a grid of ``bits`` bits whose zero point lies in its middle; values must fit it."""
        middle = 1 << (bits - 1)
        return replace(self, bits=bits, codes=self.values() + middle, zero=torch.full_like(self.zero, middle))


def grid_of(network: TensorNetwork) -> Grid | None:
    """The grid of a matrix in packed integers; None of any other network."""
    spec = network.spec
    (term, *more), fmt = spec.terms, spec.terms[0].formats[0]
    if more or not spec.is_dense or not term.layout.is_native or not isinstance(fmt, IntFormat) or len(spec.shape) != 2:
        return None
    if grouped_view(spec.shape, fmt.group) != spec.shape:  # groups that run over row ends
        return None
    rows, columns = spec.shape
    stored = {part: network.stored[part_name(0, 0, part)] for part in fmt.parts(spec.shape)}
    codes = unpack_bits(stored["_q"], fmt.bits, rows * columns).view(rows, columns).short()
    scale, offset = stored["_scale"], None
    zero = torch.full(scale.shape, 1 << (fmt.bits - 1), dtype=torch.int16)
    if fmt.zero == "int":
        zero = unpack_bits(stored["_zero"], fmt.bits, scale.numel()).view(scale.shape).short()
    elif fmt.zero == "float":
        zero, offset = torch.zeros_like(zero), stored["_zero"]
    # A ragged last group is cut so that all are of one width.
    width, equal = fmt.width(columns), gcd(fmt.width(columns), columns)
    first = torch.arange(0, columns, equal) // width
    return Grid(fmt.bits, codes, scale[:, first], zero[:, first], None if offset is None else offset[:, first])
