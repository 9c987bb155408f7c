"""Unsigned integers of 1 to 8 bits packed without gaps into bytes (little-endian bit stream)."""

from __future__ import annotations

import torch
from torch import Tensor

from tensornet_compress.errors import TensorNetError


def packed_nbytes(count: int, bits: int) -> int:
    """Bytes of ``count`` packed integers of ``bits`` bits."""
    return (count * bits + 7) // 8


def pack_bits(values: Tensor, bits: int) -> Tensor:
    """Integers in [0, 2**bits) of any shape -> flat uint8 tensor of ``packed_nbytes`` bytes.

    Raises:
        TensorNetError: ``bits`` outside 1..8, or a value outside its range.
    """
    _check_bits(bits)
    flat = values.reshape(-1)
    if flat.numel() and (int(flat.min()) < 0 or int(flat.max()) >= 1 << bits):
        raise TensorNetError(f"values from {int(flat.min())} to {int(flat.max())} do not fit {bits} bits")
    if bits == 8:
        return flat.to(torch.uint8)
    count = flat.numel()
    words = flat.new_zeros(-(-count // 8) * 8, dtype=torch.int64)
    words[:count] = flat
    shifts = torch.arange(8, device=flat.device) * bits
    stream = (words.view(-1, 8) << shifts).sum(1, keepdim=True)
    return (
        ((stream >> (8 * torch.arange(bits, device=flat.device))) & 255).to(torch.uint8).view(-1)[: packed_nbytes(count, bits)]
    )


def unpack_bits(packed: Tensor, bits: int, count: int) -> Tensor:
    """The inverse of ``pack_bits``: flat uint8 tensor of ``count`` values.

    Raises:
        TensorNetError: the number of bytes is not that of ``count`` values.
    """
    _check_bits(bits)
    if packed.numel() != packed_nbytes(count, bits):
        raise TensorNetError(f"{count} integers of {bits} bits take {packed_nbytes(count, bits)} bytes, found {packed.numel()}")
    if bits == 8:
        return packed
    if bits in (1, 2, 4):
        shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
        return ((packed[:, None] >> shifts) & ((1 << bits) - 1)).view(-1)[:count]
    groups = -(-count // 8)
    stream = torch.nn.functional.pad(packed, (0, groups * bits - packed.numel())).view(groups, bits).long()
    words = (stream << (8 * torch.arange(bits, device=packed.device))).sum(1, keepdim=True)
    values = (words >> (bits * torch.arange(8, device=packed.device))) & ((1 << bits) - 1)
    return values.to(torch.uint8).view(-1)[:count]


def _check_bits(bits: int) -> None:
    if not 1 <= bits <= 8:
        raise TensorNetError(f"packing takes 1 to 8 bits a value, was given {bits}")
