"""How a layer's inputs shifted behind a compressed prefix, and how much of that shift to make up for in the layer's weight."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tensornet_compress.calibrate import InputMoment
from tensornet_compress.errors import TensorNetError


class ShiftMoments:
    """Sums of ``x_c x_c'`` and ``(x_d - x_c) x_c'`` over tokens: inputs behind the compressed prefix, and what they lack."""

    def __init__(self) -> None:
        self._own, self._cross = InputMoment(), InputMoment()

    def add(self, vectors: Tensor, lacking: Tensor, clip: float | None) -> None:
        """Add inputs (tokens, n) and what each lacks; vectors beyond ``clip`` median lengths count as shorter."""
        weights = _clipped(vectors, clip)
        self._own.add(vectors * weights)
        self._cross.add(lacking * weights, vectors * weights)

    @property
    def count(self) -> int:
        """Tokens seen."""
        return self._own.count

    @property
    def second(self) -> Tensor:
        """``E[x_c x_c']``, float64 (n, n).

        Raises:
            TensorNetError: only zeros were seen.
        """
        mean = self._own.mean
        if not float(mean.diagonal().sum()) > 0:
            raise TensorNetError("a layer received only zeros during calibration; give other batches, or ignore it")
        return mean

    @property
    def lack(self) -> Tensor:
        """``E[(x_d - x_c) x_c']``, float64 (n, n)."""
        return self._cross.mean

    @classmethod
    def joined(cls, parts: Sequence[ShiftMoments]) -> ShiftMoments:
        """The moments of all tokens."""
        whole = cls()
        for part in parts:
            for into, moment in ((whole._own, part._own), (whole._cross, part._cross)):
                into.merge(moment)
        return whole

    def regression(self, ridge: float) -> Tensor:
        """S (n, n) of the ridge regression ``x_d - x_c ~ S x_c``; ``ridge`` is relative to the mean diagonal."""
        second = self.second
        level = float(second.diagonal().mean())
        eye = torch.eye(len(second), dtype=second.dtype, device=second.device)
        factor = torch.linalg.cholesky(second + ridge * level * eye)
        return torch.cholesky_solve(self.lack.T.contiguous(), factor).T


def crossed_share(halves: Sequence[ShiftMoments], weight: Tensor, ridge: float) -> float:
    """The share c in [0, 1] for which ``W (I + c S)`` has the least error on tokens that S was not fitted to.

    S of one half is tried on the other and the other way round: with ``e(c) = E |W (x_d - x_c) - c W S x_c|^2`` the best c is
    ``tr(W D S' W') / tr(W S C S' W')``. ``weight`` W (m, n), float64. Zero when the batches make only one half.
    """
    if len(halves) < 2:
        return 0.0
    gained = spent = 0.0
    for fitted, judge in ((halves[0], halves[1]), (halves[1], halves[0])):
        answer = weight @ fitted.regression(ridge)
        gained += float(((weight @ judge.lack) * answer).sum())
        spent += float(((answer @ judge.second) * answer).sum())
    return min(max(gained / max(spent, 1e-300), 0.0), 1.0)


def _clipped(vectors: Tensor, clip: float | None) -> Tensor | float:
    """Factors (tokens, 1) that shorten vectors beyond ``clip`` times the median length."""
    if clip is None:
        return 1.0
    lengths = vectors.norm(dim=-1, keepdim=True).clamp_min(1e-12)
    return (clip * lengths.median() / lengths).clamp_max(1.0)
