"""Spectra of the unfoldings that a topology cuts: computed once, they predict the error of every choice of ranks."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from tensornet_compress.decompose.linalg import singular_values
from tensornet_compress.tensor import Topology


def unfolding(laid_out: Tensor, left: Sequence[int]) -> Tensor:
    """The matrix of a tensor with positions ``left`` as rows and the others as columns."""
    rest = [position for position in range(laid_out.ndim) if position not in set(left)]
    rows = prod(laid_out.shape[position] for position in left)
    return laid_out.permute(*left, *rest).reshape(rows, -1)


def bond_spectra(laid_out: Tensor, topology: Topology) -> list[Tensor]:
    """Singular values (float64, descending) of the unfolding at each bond."""
    return [singular_values(unfolding(laid_out, topology.side(bond))) for bond in range(len(topology.edges))]


def tails(spectrum: Tensor) -> Tensor:
    """``tails[r]``: the squared norm that rank ``r`` drops, for r = 0 .. len(spectrum)."""
    squares = spectrum.square().flip(0).cumsum(0).flip(0)
    return torch.cat([squares, squares.new_zeros(1)])
