"""Unsigned integers of 1 to 8 bits packed without gaps into bytes (little-endian bit stream)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tensornet_compress.errors import TensorNetError

_WORDS = {1: torch.int64, 2: torch.int32, 4: torch.int16}
"""By bits: the word that has a byte for each integer in one byte."""
_STRIP = 1 << 20
"""Integers that are packed together."""


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
    packed = flat.new_empty(packed_nbytes(flat.numel(), bits), dtype=torch.uint8)
    shifts = torch.arange(8, device=flat.device) * bits
    bytes_of_word = 8 * torch.arange(bits, device=flat.device)
    # A strip at a time: eight bytes for each integer of a large table are more than there may be.
    for part, found in zip(flat.split(_STRIP), packed.split(_STRIP // 8 * bits)):
        words = F.pad(part, (0, -len(part) % 8)).long().view(-1, 8)
        stream = (words << shifts).sum(1, keepdim=True)
        found.copy_(((stream >> bytes_of_word) & 255).view(-1)[: len(found)])
    return packed


def unpack_bits(packed: Tensor, bits: int, count: int) -> Tensor:
    """The inverse of ``pack_bits``: flat uint8 tensor of ``count`` values.

    Raises:
        TensorNetError: the number of bytes is not that of ``count`` values.
    """
    _check_bits(bits)
    if packed.numel() != packed_nbytes(count, bits):
        raise TensorNetError(f"{count} integers of {bits} bits take {packed_nbytes(count, bits)} bytes, found {packed.numel()}")
    if bits == 8 or count == 0:
        return packed
    if bits in _WORDS:
        words = packed.to(_WORDS[bits])
        return _spread(words, bits, 8 // bits).view(torch.uint8)[:count]
    groups = -(-count // 8)
    stream = F.pad(packed, (0, groups * bits - packed.numel())).view(groups, bits)
    words = F.pad(stream, (0, 8 - bits)).view(torch.int64)
    return _spread(words, bits, 8).view(torch.uint8).view(-1)[:count]


def take_bits(packed: Tensor, bits: int, index: Tensor) -> Tensor:
    """The packed integers at ``index`` (int64, any shape), int32."""
    start = index * bits
    low, high = packed[start >> 3].int(), packed[((start + bits - 1) >> 3)].int()
    return ((low | high << 8) >> (start & 7)) & ((1 << bits) - 1)


def _spread(words: Tensor, bits: int, values: int) -> Tensor:
    """Words whose lowest bits hold ``values`` integers of ``bits`` bits -> the same with a byte for each.

    The upper half of the integers moves up to the upper half of the word, then the same in each half: a few passes over whole
    words, in place of one for each integer.
    """
    while values > 1:
        values //= 2
        low = ((1 << values * bits) - 1) * sum(1 << 16 * values * place for place in range(words.itemsize // (2 * values)))
        high = low << 8 * values
        moved = (words << values * (8 - bits)).bitwise_and_(_signed(high, words))
        words = (words & _signed(low, words)).bitwise_or_(moved)
    return words


def _signed(mask: int, words: Tensor) -> int:
    return mask - (1 << 8 * words.itemsize) if mask >> (8 * words.itemsize - 1) else mask


def _check_bits(bits: int) -> None:
    if not 1 <= bits <= 8:
        raise TensorNetError(f"packing takes 1 to 8 bits a value, was given {bits}")
