"""Spectra of the unfoldings of one tensor: each bipartition of its modes is computed once and shared by all candidates.

Outer products of smaller tensors are seen in a few sampled entries and checked on all; then only their factors are cut.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import combinations
from math import prod

import numpy as np
import torch
from torch import Tensor

from tensornet_compress.decompose import unfolding
from tensornet_compress.decompose.linalg import gram_squares, rank_one_parts
from tensornet_compress.metric import squared_norm

EXACT_SIDE = 1024
LARGEST_SIDE = 4608
_MANY = 1 << 20
_FEW = 1 << 12
_TINY = 1 << 8
_SKETCH = 256
_POWER_STEPS = 1
_GLANCE = 64
PURE = 1e-13
"""A cut is of rank 1 when all but this share of the energy is in its first value: below what single precision resolves."""
_SAMPLED = 8
_ALL_SUBSETS = 8
_SUSPECT = 1e-10


class SpectrumStore:
    """Lazily computed singular values of the unfoldings of ``modes`` (any shape).

    Sides up to 1,024 use a float64 Gram matrix (values below 1e-8 of the largest are noise), or a float32 one where ``precise``
    is false (3e-4); sides up to 4,608 of tensors of at most 2^20 entries a float32 one. All others are estimated from a
    randomised sketch of 256 values: the energy beyond these is known exactly, and assumed to fall linearly.

    Where a cut turns out to be of rank 1, but for a share ``pure`` of the energy, the tensor is an outer product of two smaller
    ones: from then on only these are cut, and spectra of the whole are products of theirs.
    """

    def __init__(self, modes: Tensor, precise: bool = True, pure: float = PURE, energy: float | None = None):
        self._pure = pure
        self._exact = EXACT_SIDE if precise else 0
        self._largest = LARGEST_SIDE if modes.numel() <= _MANY else min(EXACT_SIDE, LARGEST_SIDE)
        self.modes = modes if modes.dtype == torch.float64 else modes.float()
        self.dims = tuple(modes.shape)
        self.energy = squared_norm(self.modes) if energy is None else energy
        self._known: dict[frozenset[int], np.ndarray] = {}
        self._tails: dict[frozenset[int], np.ndarray] = {}
        self._falling: dict[frozenset[int], np.ndarray] = {}
        self._entropies: dict[frozenset[int], float] = {}
        self._parts: list[tuple[tuple[int, ...], SpectrumStore]] = []
        self._all = frozenset(range(modes.ndim))
        self._sought = False

    def __len__(self) -> int:
        """Number of unfoldings computed so far."""
        return len(self._known) + sum(len(part) for _, part in self._parts)

    def factors(self) -> list[tuple[tuple[int, ...], SpectrumStore]]:
        """The smaller tensors that this one is seen to be an outer product of: their modes here, and their stores."""
        self._seek_product()
        smallest: list[tuple[tuple[int, ...], SpectrumStore]] = []
        for modes, part in self._parts:
            inner = [(tuple(modes[place] for place in places), factor) for places, factor in part.factors()]
            smallest += inner or [(modes, part)]
        return smallest

    def key(self, left: Iterable[int]) -> frozenset[int]:
        """One name for a bipartition: the side without mode 0."""
        side = frozenset(left)
        return self._all - side if 0 in side else side

    def spectrum(self, left: Iterable[int]) -> Tensor:
        """Singular values (float64, on the CPU, descending) with the modes ``left`` as rows."""
        return torch.from_numpy(self._values(self.key(left)))

    def leading(self, left: Iterable[int]) -> list[float]:
        """The first 256 singular values over the largest: for plots."""
        values = self._values(self.key(left))
        return [float(value) for value in values[:256] / max(float(values[0]), 1e-300)]

    def tails(self, left: Iterable[int]) -> np.ndarray:
        """Squared norm dropped at each rank, see ``decompose.tails``."""
        key = self.key(left)
        if key not in self._tails:
            values = self._values(key)
            self._tails[key] = np.zeros(len(values) + 1)
            np.square(values[::-1]).cumsum(out=self._tails[key][-2::-1])
        return self._tails[key]

    def rank(self, left: Iterable[int], allowed: float) -> int:
        """The least rank (at least 1) that drops a squared norm of at most ``allowed``."""
        key = self.key(left)
        if key not in self._falling:
            self._falling[key] = -self.tails(key)
        return max(1, int(self._falling[key].searchsorted(-allowed)))

    def entropy(self, left: Iterable[int]) -> float:
        """Entanglement entropy in bits: of the squared singular values as a distribution."""
        key = self.key(left)
        if not key or len(key) == len(self.dims) or self.energy == 0.0:
            return 0.0
        if key not in self._entropies:
            self._seek_product()
            inside = [(part, [place for place, mode in enumerate(modes) if mode in key]) for modes, part in self._parts]
            entropy = sum(part.entropy(places) for part, places in inside)
            self._entropies[key] = entropy if inside else spectral_entropy(self._values(key))
        return self._entropies[key]

    def side(self, left: Iterable[int]) -> int:
        """Length of the shorter side of an unfolding: what its spectrum costs grows with it."""
        rows = prod(self.dims[mode] for mode in left)
        return min(rows, prod(self.dims) // max(rows, 1))

    def captured(self, left: Iterable[int]) -> float:
        """About the share of the energy in the 64 largest values, from a sketch: tells promising cuts from others cheaply."""
        key = self.key(left)
        if key in self._known or self.side(key) <= EXACT_SIDE or self._parts:
            return float(self.spectrum(key)[:_GLANCE].square().sum()) / max(self.energy, 1e-300)
        matrix = unfolding(self.modes, sorted(key))
        basis = torch.linalg.qr(self._sample(matrix, _GLANCE))[0]
        return float((basis.T @ matrix).square().sum()) / max(self.energy, 1e-300)

    def _values(self, key: frozenset[int]) -> np.ndarray:
        if key not in self._known:
            self._known[key] = self._compute(key)
        return self._known[key]

    def _compute(self, key: frozenset[int]) -> np.ndarray:
        """Of an outer product the product of the spectra of all factors that ``key`` cuts."""
        self._seek_product()
        if not self._parts:
            return self._cut(sorted(key))
        product, cut = np.array([self.energy**0.5]), 0
        for modes, part in self._parts:
            inside = [place for place, mode in enumerate(modes) if mode in key]
            if 0 < len(inside) < len(modes):
                values = part._values(part.key(inside)) / max(part.energy, 1e-300) ** 0.5
                product = np.multiply.outer(product, values).reshape(-1) if cut else product * values
                cut += 1
        if cut > 1:
            product.sort()
            product = product[::-1].copy()
        return product

    def _seek_product(self) -> None:
        """Once: split the tensor where sampled entries show an outer product, before any of its unfoldings is computed. Of a
        small matrix the only spectrum tells as much."""
        known = self._sought or (len(self.dims) < 3 and self.modes.numel() <= _FEW)
        self._sought = True
        if not known:
            self._split(product_parts(self.modes, self.energy, self._pure))

    def _cut(self, inside: list[int]) -> np.ndarray:
        """Spectrum of one unfolding; where that is of rank 1 the tensor is split."""
        matrix = unfolding(self.modes, inside)
        short = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
        if len(short) > self._largest:
            return self._sketched(short)
        if short.numel() <= _TINY:
            squares = np.square(np.linalg.svd(short.double().cpu().numpy(), compute_uv=False))
        else:
            squares = gram_squares(short.double() if len(short) <= self._exact else short).cpu().numpy()
        if 0 < squares[0] * self._pure >= squares[1:].sum() and len(squares) > 1:
            rest = [mode for mode in range(len(self.dims)) if mode not in inside]
            self._split(
                (tuple(modes), part.reshape([self.dims[mode] for mode in modes]))
                for modes, part in zip((inside, rest), rank_one_parts(matrix))
            )
        return np.sqrt(squares)

    def _split(self, parts: Iterable[tuple[tuple[int, ...], Tensor]]) -> None:
        """Go on with the parts of an outer product, if there are any."""
        for modes, part in parts:
            self._parts.append((modes, SpectrumStore(part, precise=self._exact > 0, pure=self._pure)))

    def _sketched(self, matrix: Tensor) -> np.ndarray:
        sample = self._sample(matrix, min(_SKETCH, len(matrix)))
        for _ in range(_POWER_STEPS):
            sample = matrix @ (matrix.T @ torch.linalg.qr(sample)[0])
        core = torch.linalg.qr(sample)[0].T @ matrix
        leading = torch.linalg.eigvalsh((core @ core.T).double()).cpu().flip(0).clamp_min(0)
        count = len(matrix) - len(leading)
        mean = max(0.0, float(matrix.square().sum(dtype=torch.float64) - leading.sum())) / max(count, 1)
        highest = min(float(leading[-1]), 2 * mean)
        falling = torch.linspace(highest, max(0.0, 2 * mean - highest), count, dtype=torch.float64)
        return torch.cat([leading, falling]).sort(descending=True).values.sqrt().numpy()

    @staticmethod
    def _sample(matrix: Tensor, count: int) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return matrix @ torch.randn(matrix.shape[1], count, generator=generator, dtype=matrix.dtype).to(matrix.device)


def spectral_entropy(values: np.ndarray) -> float:
    """Entropy in bits of squared singular values as a distribution."""
    weights = np.square(values)
    weights /= max(float(weights.sum()), 1e-300)
    return -float(weights @ np.log2(np.maximum(weights, 1e-300)))


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
