"""Permutations packed to ceil(log2 n!) bits by their Lehmer code in the factorial number system."""

from __future__ import annotations

from functools import cache
from math import factorial, lgamma, log

import numpy as np
import torch
from torch import Tensor

from tensornet_compress.errors import TensorNetError

_EXACT = 1000


@cache
def packed_permutation_nbytes(n: int) -> int:
    """Bytes that a packed permutation of ``n`` items takes."""
    if n > _EXACT:
        # n! is no power of two, so its bits are log2(n!) rounded up; only near a whole byte is the product itself needed.
        nbytes = lgamma(n + 1) / log(2) / 8
        if abs(nbytes - round(nbytes)) > 1e-12 * nbytes:
            return int(nbytes) + 1
    return ((factorial(n) - 1).bit_length() + 7) // 8


def pack_permutation(permutation: tuple[int, ...] | list[int]) -> Tensor:
    """A permutation -> uint8 tensor of ``packed_permutation_nbytes(n)`` bytes (Lehmer code, little-endian)."""
    n = len(permutation)
    check_permutation(permutation)
    remaining = np.arange(n)
    number = 0
    for position, item in enumerate(permutation):
        rank = int(np.searchsorted(remaining, item))
        remaining = np.delete(remaining, rank)
        number = number * (n - position) + rank
    raw = number.to_bytes(packed_permutation_nbytes(n), "little")
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8) if raw else torch.empty(0, dtype=torch.uint8)


def unpack_permutation(packed: Tensor, n: int) -> tuple[int, ...]:
    """The inverse of ``pack_permutation``.

    Raises:
        TensorNetError: the bytes are not the packed form of a permutation of ``n`` items.
    """
    expected = packed_permutation_nbytes(n)
    if packed.dtype != torch.uint8 or packed.numel() != expected:
        raise TensorNetError(
            f"a packed order of {n} items takes {expected} bytes of uint8, found {packed.numel()} of {packed.dtype}"
        )
    number = int.from_bytes(packed.cpu().numpy().tobytes(), "little")
    ranks: list[int] = []
    for base in range(1, n + 1):
        number, rank = divmod(number, base)
        ranks.append(rank)
    if number:
        raise TensorNetError(f"the packed order of {n} items holds a number beyond {n}! - 1; the file is damaged")
    remaining = list(range(n))
    return tuple(remaining.pop(rank) for rank in reversed(ranks))


def check_permutation(permutation: tuple[int, ...] | list[int]) -> None:
    """Raise TensorNetError unless the items are 0 .. n-1, each once."""
    if sorted(permutation) != list(range(len(permutation))):
        raise TensorNetError(f"not a permutation of 0..{len(permutation) - 1}: {str(tuple(permutation))[:80]}")
