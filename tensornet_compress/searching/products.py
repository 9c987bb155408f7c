"""Outer products: is a tensor one of two smaller ones? Seen in a few sampled entries, then checked on all."""

from __future__ import annotations

from functools import lru_cache
from itertools import combinations

import numpy as np
import torch
from torch import Tensor

from tensornet_compress.metric import squared_norm

PURE = 1e-13
"""A cut is of rank 1 when all but this share of the energy is in its first value: below what single precision resolves."""
_SAMPLED = 8
_ALL_SUBSETS = 8
_SUSPECT = 1e-10


def product_cut(tensor: Tensor, pure: float = PURE) -> tuple[list[int], Tensor, Tensor] | None:
    """Modes whose cut from all others is of rank 1 but for a share ``pure`` of the energy, with the two parts as vectors;
    ``None`` where the samples show no such cut.

    Looks at all cuts of up to 8 modes, and at single modes and pairs of more. Entries are sampled with a fixed seed; a tensor
    that is zero almost everywhere shows nothing.
    """
    cuts = _suspects(tensor)
    energy = squared_norm(tensor) if cuts else 0.0
    pivot = np.unravel_index(int(tensor.abs().argmax()), tuple(tensor.shape)) if cuts else ()
    for inside in cuts:
        rest = [mode for mode in range(tensor.ndim) if mode not in inside]
        column, row = (tensor[tuple(slice(None) if m in own else int(pivot[m]) for m in range(tensor.ndim))] for own in (inside, rest))
        # Of an outer product one column is exact but for rounding, which sums over long rows in single precision are not.
        column = column.reshape(-1) / tensor[pivot]
        product = torch.outer(column, row.reshape(-1))
        left = squared_norm(product.reshape([tensor.shape[mode] for mode in (*inside, *rest)]).sub_(tensor.permute(*inside, *rest)))
        if 0 < left + 1e-300 <= pure * energy:
            return inside, column, row.reshape(-1)
    return None


def _suspects(tensor: Tensor) -> list[list[int]]:
    if tensor.ndim < 2:
        return []
    cuts, flat = _samples(tuple(tensor.shape))
    values = tensor.reshape(-1)[flat].double().cpu().numpy()
    # Of a matrix of rank 1 nothing is left once the row and the column of its largest entry are taken out.
    number = np.arange(len(cuts))
    row, column = np.divmod(np.abs(values).reshape(len(cuts), -1).argmax(1), _SAMPLED)
    largest = values[number, row, column]
    values = values / np.where(largest == 0.0, 1.0, largest)[:, None, None]
    left = values - values[number, :, column][:, :, None] * values[number, row][:, None, :]
    pure = (largest != 0) & (np.square(left).sum((1, 2)) <= _SUSPECT * np.square(values).sum((1, 2)))
    return [list(cut) for cut, is_pure in zip(cuts, pure) if is_pure]


@lru_cache(maxsize=256)
def _samples(shape: tuple[int, ...]) -> tuple[list[tuple[int, ...]], Tensor]:
    """Cuts, and of each the places of a sampled submatrix of the unfolding in the flattened tensor: (cuts, 8, 8)."""
    count = len(shape)
    sizes = range(1, count // 2 + 1 if count <= _ALL_SUBSETS else 3)
    cuts = [cut for size in sizes for cut in combinations(range(count), size)]
    draw = np.random.default_rng(0)
    rows, columns = (np.stack([draw.integers(0, n, _SAMPLED) for n in shape]) for _ in range(2))
    within = np.zeros((len(cuts), count, 1, 1), bool)
    for number, cut in enumerate(cuts):
        within[number, list(cut)] = True
    places = np.where(within, rows[None, :, :, None], columns[None, :, None, :])
    return cuts, torch.from_numpy(np.ravel_multi_index(tuple(places.transpose(1, 0, 2, 3)), shape))
