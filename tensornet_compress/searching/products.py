"""Outer products: is a tensor one of two smaller ones? Seen in a few sampled entries, then checked on all."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import torch
from torch import Tensor

from tensornet_compress.decompose.spectra import unfolding
from tensornet_compress.metric import squared_norm

PURE = 1e-13
"""A cut is of rank 1 when all but this share of the energy is in its first value: below what single precision resolves."""
_SAMPLED = 8
_ALL_SUBSETS = 8
_SUSPECT = 1e-10


def rank_one_parts(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """``column, row`` with ``column row'`` the matrix, when that is of rank 1."""
    row = matrix[int(torch.linalg.vector_norm(matrix, dim=1).argmax())]
    place = int(row.abs().argmax())
    # Of an outer product one column is exact but for rounding, which sums over long rows in single precision are not.
    return matrix[:, place] / row[place], row


def product_cut(tensor: Tensor, pure: float = PURE) -> tuple[list[int], Tensor, Tensor] | None:
    """Modes whose cut from all others is of rank 1 but for a share ``pure`` of the energy, with the two parts as vectors;
    ``None`` where the samples show no such cut.

    Looks at all cuts of up to 8 modes, and at single modes and pairs of more. Entries are sampled with a fixed seed; a tensor
    that is zero almost everywhere shows nothing.
    """
    for inside in _suspects(tensor):
        matrix = unfolding(tensor, inside)
        column, row = rank_one_parts(matrix)
        left = squared_norm(torch.outer(column, row).sub_(matrix))
        if 0 < left + 1e-300 <= pure * squared_norm(matrix):
            return inside, column, row
    return None


def _suspects(tensor: Tensor) -> list[list[int]]:
    count = tensor.ndim
    sizes = range(1, count // 2 + 1 if count <= _ALL_SUBSETS else 3)
    cuts = [list(cut) for size in sizes for cut in combinations(range(count), size)]
    if count < 2 or not cuts:
        return []
    draw = np.random.default_rng(0)
    rows, columns = (np.stack([draw.integers(0, n, _SAMPLED) for n in tensor.shape]) for _ in range(2))
    within = np.zeros((len(cuts), count, 1, 1), bool)
    for number, cut in enumerate(cuts):
        within[number, cut] = True
    places = np.where(within, rows[None, :, :, None], columns[None, :, None, :])
    flat = np.ravel_multi_index(tuple(places.transpose(1, 0, 2, 3)), tuple(tensor.shape))
    values = np.linalg.svd(tensor.reshape(-1)[torch.from_numpy(flat)].double().cpu().numpy(), compute_uv=False)
    pure = (values[:, 0] > 0) & (values[:, 1] ** 2 <= _SUSPECT * values[:, 0] ** 2)
    return [cut for cut, is_pure in zip(cuts, pure) if is_pure]
