"""A matrix of coded numbers: what number formats hand to products, and what it decodes to."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tensornet_compress.coding.bits import pack_bits, take_bits, unpack_bits


class Codes(NamedTuple):
    """Integers ``q`` (m, width) and what turns them into numbers.

    With ``column``: ``W[r, i] = scale[r] * column[i] * (q[r, i] + excess)``.
    Without, by groups of columns: ``W = scale * q + zero``.

    Args:
        codes: int8 (m, width), or uint8, all codes of ``bits`` bits packed by rows (``pack_bits``).
        scale: (m, groups).
        zero: ``None``: unsigned codes have their middle at zero; uint8: a packed code for each group that stands for zero;
            floats: added to each group, (m, groups).
        column: fp32 (width,), with ``place`` and ``excess`` int32 (k,), the flat places of codes that do not fit, in order,
            and what is to be added to them.
        group: columns that share a scale.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    column: Tensor | None
    place: Tensor | None
    excess: Tensor | None
    bits: int
    width: int
    group: int

    @property
    def signed(self) -> bool:
        """Whether codes are plain int8."""
        return self.codes.dtype == torch.int8

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The matrix (m, width), computed in at least fp32 and rounded once; differentiable with respect to scale and zero."""
        if dtype not in (torch.float32, torch.float64):
            return self.dense(torch.float32).to(dtype)
        m, groups = self.scale.shape
        whole = self.codes if self.signed else unpack_bits(self.codes, self.bits, m * self.width)
        codes, scale = whole.view(m, self.width).to(dtype), self.scale.to(dtype)
        if self.column is not None:
            return self._by_factors(codes, scale)
        if self.zero is None:
            zero = -scale * (0 if self.signed else 1 << (self.bits - 1))
        elif self.zero.is_floating_point():
            zero = self.zero.to(dtype)
        else:
            zero = -scale * unpack_bits(self.zero, self.bits, m * groups).view(m, groups).to(dtype)
        if self.width % self.group == 0:
            codes, scale, zero = codes.view(m, groups, self.group), scale[..., None], zero[..., None]
        else:
            scale, zero = (part.repeat_interleave(self.group, 1)[:, : self.width] for part in (scale, zero))
        if torch.is_grad_enabled() and (scale.requires_grad or zero.requires_grad):
            return (codes * scale + zero).view(m, self.width)
        return codes.mul_(scale).add_(zero).view(m, self.width)

    def _by_factors(self, codes: Tensor, scale: Tensor) -> Tensor:
        assert self.column is not None
        # In place: the table of a large vocabulary would need three times its memory.
        dense = (codes if self.signed else codes.sub_(1 << (self.bits - 1))).mul_(self.column)
        if self.place is not None and self.excess is not None and len(self.place):
            dense.view(-1).index_add_(0, self.place, (self.excess * self.column[self.place % self.width]).to(dense.dtype))
        return dense * scale if torch.is_grad_enabled() and scale.requires_grad else dense.mul_(scale)

    def rows(self, wanted: Tensor) -> Codes:
        """The matrix of rows ``wanted`` (int64, (k,))."""
        place, excess = self.place, self.excess
        if place is not None and excess is not None and len(place):
            # The excess lies sorted by row: of every wanted row the stretch that belongs to it.
            border = torch.searchsorted(place // self.width, torch.stack([wanted, wanted + 1]))
            count = border[1] - border[0]
            owner = torch.repeat_interleave(torch.arange(len(wanted), device=wanted.device), count)
            which = border[0][owner] + torch.arange(len(owner), device=wanted.device) - (count.cumsum(0) - count)[owner]
            place, excess = (owner * self.width + place[which] % self.width).to(place.dtype), excess[which]
        scale, zero, codes = self.scale.index_select(0, wanted), self.zero, self.codes
        if zero is not None:
            zero = zero.index_select(0, wanted) if zero.is_floating_point() else self._packed(zero, wanted, self.scale.shape[1])
        codes = codes.index_select(0, wanted) if self.signed else self._packed(codes, wanted, self.width)
        return self._replace(codes=codes, scale=scale, zero=zero, place=place, excess=excess)

    def _packed(self, packed: Tensor, wanted: Tensor, count: int) -> Tensor:
        """Of packed rows of ``count`` codes the wanted ones."""
        if count * self.bits % 8 == 0:
            return packed.view(-1, count * self.bits // 8).index_select(0, wanted).view(-1)
        index = wanted[:, None] * count + torch.arange(count, device=wanted.device)
        return pack_bits(take_bits(packed, self.bits, index), self.bits)
