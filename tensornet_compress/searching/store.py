"""Spectra of the unfoldings of one tensor: each bipartition of its modes is computed once and shared by all candidates."""

from __future__ import annotations

from collections.abc import Iterable
from math import prod

import torch
from torch import Tensor

from tensornet_compress.decompose.spectra import tails, unfolding

EXACT_SIDE = 1024
LARGEST_SIDE = 4608
_SKETCH = 1024
_POWER_STEPS = 1


class SpectrumStore:
    """Lazily computed singular values of the unfoldings of ``modes`` (any shape).

    Sides up to 1,024 use a float64 Gram matrix (values below 1e-8 of the largest are noise), sides up to 4,608 a float32 one
    (3e-4), larger ones a randomised sketch of 1,024 values: the energy beyond these is known exactly and spread evenly over the
    values that follow, so that what any rank up to 1,024 drops is exact up to the sketch's own error in the leading values,
    which can only overestimate what is dropped.
    """

    def __init__(self, modes: Tensor):
        self.modes = modes if modes.dtype == torch.float64 else modes.float()
        self.dims = tuple(modes.shape)
        self.energy = float(self.modes.double().square().sum())
        self._known: dict[frozenset[int], Tensor] = {}
        self._tails: dict[frozenset[int], Tensor] = {}

    def __len__(self) -> int:
        """Number of unfoldings computed so far."""
        return len(self._known)

    def key(self, left: Iterable[int]) -> frozenset[int]:
        """One name for a bipartition: the side without mode 0."""
        side = frozenset(left)
        return frozenset(range(len(self.dims))) - side if 0 in side else side

    def spectrum(self, left: Iterable[int]) -> Tensor:
        """Singular values (float64, descending) with the modes ``left`` as rows."""
        key = self.key(left)
        if key not in self._known:
            self._known[key] = self._compute(key)
        return self._known[key]

    def tails(self, left: Iterable[int]) -> Tensor:
        """Squared norm dropped at each rank, see ``decompose.spectra.tails``."""
        key = self.key(left)
        if key not in self._tails:
            self._tails[key] = tails(self.spectrum(key))
        return self._tails[key]

    def rank(self, left: Iterable[int], allowed: float) -> int:
        """The least rank (at least 1) that drops a squared norm of at most ``allowed``."""
        dropped = self.tails(left)
        return max(1, int((dropped > allowed).sum()))

    def entropy(self, left: Iterable[int]) -> float:
        """Entanglement entropy in bits: of the squared singular values as a distribution."""
        key = self.key(left)
        if not key or len(key) == len(self.dims) or self.energy == 0.0:
            return 0.0
        weights = self.spectrum(key).square()
        weights = weights / weights.sum().clamp_min(1e-300)
        return float(-(weights * weights.clamp_min(1e-300).log2()).sum())

    def side(self, left: Iterable[int]) -> int:
        """Length of the shorter side of an unfolding: what its spectrum costs grows with it."""
        rows = prod(self.dims[mode] for mode in left)
        return min(rows, prod(self.dims) // max(rows, 1))

    def _compute(self, key: frozenset[int]) -> Tensor:
        if not key:
            return torch.tensor([self.energy**0.5], dtype=torch.float64)
        matrix = unfolding(self.modes, sorted(key))
        if matrix.shape[0] > matrix.shape[1]:
            matrix = matrix.T
        if len(matrix) > LARGEST_SIDE:
            return self._sketched(matrix)
        wide = matrix.double() if len(matrix) <= EXACT_SIDE else matrix
        return torch.linalg.eigvalsh(wide @ wide.T).double().flip(0).clamp_min(0).sqrt()

    def _sketched(self, matrix: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        sample = matrix @ torch.randn(matrix.shape[1], _SKETCH, generator=generator, dtype=matrix.dtype).to(matrix.device)
        for _ in range(_POWER_STEPS):
            sample = matrix @ (matrix.T @ torch.linalg.qr(sample)[0])
        core = torch.linalg.qr(sample)[0].T @ matrix
        leading = torch.linalg.eigvalsh((core @ core.T).double()).flip(0).clamp_min(0)
        rest = max(0.0, self.energy - float(leading.sum()))
        count = len(matrix) - len(leading)
        return torch.cat([leading, leading.new_full((count,), rest / count)]).sqrt()
