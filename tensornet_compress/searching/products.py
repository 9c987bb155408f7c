"""Outer products: is a tensor one of two smaller ones? Seen in a few sampled entries, then checked on all."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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


def product_cut(tensor: Tensor, energy: float, pure: float = PURE) -> tuple[list[int], Tensor, Tensor] | None:
    """Modes whose cut from all others is of rank 1 but for a share ``pure`` of the ``energy`` (the squared norm), with the two
    parts as vectors; ``None`` where the samples show no such cut.

    Looks at all cuts of up to 8 modes, and at single modes and pairs of more. Entries are sampled with a fixed seed; a tensor
    that is zero almost everywhere shows nothing.
    """
    for inside, pivot in _suspects(tensor):
        rest = [mode for mode in range(tensor.ndim) if mode not in inside]
        column, row = _through(tensor, pivot, inside), _through(tensor, pivot, rest)
        # Of an outer product one column is exact but for rounding, which sums over long rows in single precision are not.
        column = column / tensor[pivot]
        product = torch.outer(column, row).reshape([tensor.shape[mode] for mode in (*inside, *rest)])
        if 0 < squared_norm(product.sub_(tensor.permute(*inside, *rest))) + 1e-300 <= pure * energy:
            return inside, column, row
    return None


def _through(tensor: Tensor, place: tuple[int, ...], free: Sequence[int]) -> Tensor:
    """The entries of which all modes but the free ones are as in ``place``, as a vector."""
    return tensor[tuple(slice(None) if mode in free else index for mode, index in enumerate(place))].reshape(-1)


def _suspects(tensor: Tensor) -> Iterator[tuple[list[int], tuple[int, ...]]]:
    """Cuts of which a sampled submatrix is of rank 1, and the place of its largest entry."""
    if tensor.ndim < 2:
        return
    cuts, flat = _samples(tuple(tensor.shape))
    values = tensor.reshape(-1)[flat].double().cpu().numpy()
    # Of a matrix of rank 1 nothing is left once the row and the column of its largest entry are taken out.
    number = np.arange(len(cuts))
    row, column = np.divmod(np.abs(values).reshape(len(cuts), -1).argmax(1), _SAMPLED)
    largest = values[number, row, column]
    values = values / np.where(largest == 0.0, 1.0, largest)[:, None, None]
    left = values - values[number, :, column][:, :, None] * values[number, row][:, None, :]
    pure = (largest != 0) & (np.square(left).sum((1, 2)) <= _SUSPECT * np.square(values).sum((1, 2)))
    for cut in np.flatnonzero(pure):
        place = np.unravel_index(int(flat[cut, row[cut], column[cut]]), tuple(tensor.shape))
        yield list(cuts[cut]), tuple(map(int, place))


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
