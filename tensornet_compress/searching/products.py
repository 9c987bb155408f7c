"""Outer products: is a tensor one of smaller ones? Seen in a few sampled entries, then checked on all."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import combinations

import numpy as np
import torch
from torch import Tensor

from tensornet_compress.decompose import unfolding
from tensornet_compress.metric import squared_norm

PURE = 1e-13
"""A cut is of rank 1 when all but this share of the energy is in its first value: below what single precision resolves."""
_SAMPLED = 8
_ALL_SUBSETS = 8
_SUSPECT = 1e-10


def product_parts(tensor: Tensor, energy: float, pure: float = PURE) -> list[tuple[tuple[int, ...], Tensor]]:
    """The smaller tensors that a tensor is an outer product of, but for a share ``pure`` of the ``energy`` (its squared norm)
    at every cut, up to their scales, with the modes of each; nothing where samples show no such cut.

    Looks at all cuts of up to 8 modes, and at single modes and pairs of more. Entries are sampled once with a fixed seed; a
    tensor that is zero almost everywhere shows nothing. A part may be a product itself, where a cut of it was not looked at.
    """
    parts: list[tuple[tuple[int, ...], Tensor]] = []
    left = tuple(range(tensor.ndim))
    for cut, pivot in _suspects(tensor):
        if not set(cut) < set(left):
            continue
        inside = [place for place, mode in enumerate(left) if mode in cut]
        rest = [place for place, mode in enumerate(left) if mode not in cut]
        place = tuple(pivot[mode] for mode in left)
        column, row = _through(tensor, place, inside), _through(tensor, place, rest)
        # Of an outer product one column is exact but for rounding, which sums over long rows in single precision are not.
        scaled = (column / tensor[place]).reshape(-1)
        if squared_norm(torch.outer(scaled, row.reshape(-1)).sub_(unfolding(tensor, inside))) <= pure * energy:
            parts.append((tuple(cut), column))
            tensor, left, energy = row, tuple(left[place] for place in rest), squared_norm(row)
    return [*parts, (left, tensor)] if parts else []


def _through(tensor: Tensor, place: tuple[int, ...], free: Sequence[int]) -> Tensor:
    """The entries of which all modes but the free ones are as in ``place``."""
    return tensor[tuple(slice(None) if mode in free else index for mode, index in enumerate(place))]


def _suspects(tensor: Tensor) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
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
        yield cuts[cut], tuple(map(int, place))


@lru_cache(maxsize=256)
def _samples(shape: tuple[int, ...]) -> tuple[list[tuple[int, ...]], Tensor]:
    """Cuts, and of each the places of a sampled submatrix of the unfolding in the flattened tensor: (cuts, 8, 8)."""
    count = len(shape)
    sizes = range(1, count // 2 + 1 if count <= _ALL_SUBSETS else 3)
    # Of a cut in halves one side names both.
    cuts = [cut for size in sizes for cut in combinations(range(count), size) if 2 * size < count or 0 in cut]
    draw = np.random.default_rng(0)
    rows, columns = (np.stack([draw.integers(0, n, _SAMPLED) for n in shape]) for _ in range(2))
    within = np.zeros((len(cuts), count, 1, 1), bool)
    for number, cut in enumerate(cuts):
        within[number, list(cut)] = True
    places = np.where(within, rows[None, :, :, None], columns[None, :, None, :])
    return cuts, torch.from_numpy(np.ravel_multi_index(tuple(places.transpose(1, 0, 2, 3)), shape))
