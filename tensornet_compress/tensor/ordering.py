"""Orderings: reversible permutations, and what each costs in bits.

Mode orders are plain tuples kept in a ``Layout``; fibre orders permute the entries of one axis. An order of d modes takes
log2(d!) bits, one of n fibres ceil(log2 n!) as packed, and a sort of n entries log2(n!) / n bits an entry.
"""

from __future__ import annotations

from math import lgamma, log
from typing import Self

import torch
from pydantic import model_validator
from torch import Tensor

from tensornet_compress.coding import packed_permutation_nbytes
from tensornet_compress.coding.permutations import check_permutation
from tensornet_compress.errors import TensorNetError
from tensornet_compress.frozen import Frozen


def permutation_bits(n: int) -> float:
    """log2(n!): the bits of one permutation of ``n`` items."""
    return lgamma(n + 1) / log(2)


class FibreOrder(Frozen):
    """A permutation of the fibres of one axis: position ``i`` of the ordered axis shows fibre ``permutation[i]``.

    An empty permutation stands for one that is stored elsewhere (a saved folder keeps it packed, as a tensor).
    ``absorbed`` says that a neighbouring tensor in the same file already carries the order, which makes it free.
    """

    axis: int
    permutation: tuple[int, ...]
    absorbed: bool = False

    @model_validator(mode="after")
    def _check(self) -> Self:
        check_permutation(self.permutation)
        return self

    @property
    def nbytes(self) -> int:
        """Stored bytes of the packed permutation; 0 when absorbed."""
        return 0 if self.absorbed else packed_permutation_nbytes(len(self.permutation))

    def inverse(self) -> FibreOrder:
        """The order that undoes this one."""
        inverse = [0] * len(self.permutation)
        for position, fibre in enumerate(self.permutation):
            inverse[fibre] = position
        return self.model_copy(update={"permutation": tuple(inverse)})

    def then(self, after: FibreOrder) -> FibreOrder:
        """The single order equal to this one followed by ``after``, on the same axis."""
        if after.axis != self.axis or len(after.permutation) != len(self.permutation):
            raise TensorNetError(
                f"cannot compose an order of axis {self.axis} ({len(self.permutation)} fibres) with one of axis {after.axis} "
                f"({len(after.permutation)} fibres)"
            )
        return self.model_copy(update={"permutation": tuple(self.permutation[i] for i in after.permutation)})

    def index(self, device: torch.device | None = None) -> Tensor:
        """The permutation as an int64 tensor."""
        return torch.tensor(self.permutation, dtype=torch.int64, device=device)

    def apply(self, tensor: Tensor) -> Tensor:
        """Reorder the fibres of ``tensor`` along ``axis``."""
        return tensor.index_select(self.axis, self.index(tensor.device))

    def invert(self, tensor: Tensor) -> Tensor:
        """Undo ``apply``."""
        return self.inverse().apply(tensor)
