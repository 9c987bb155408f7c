"""TurboQuant-style: a random rotation, a norm per token, levels of a Gaussian."""

from __future__ import annotations

import torch
from torch import Tensor

from tensornet_compress.bench.cache_case import CACHE_METHODS, CacheCase, CacheMethod, States, nominal
from tensornet_compress.kv.rope import Rotary


class TurboQuant:
    """TurboQuant-style (2504.19874): a random rotation per head, one norm per token, Lloyd-Max levels of a Gaussian."""

    def __init__(self, bits: int, rotary: Rotary, width: int):
        self.bits, self.rotary, self.width = bits, rotary, width
        generator = torch.Generator().manual_seed(0)
        self.turn = torch.linalg.qr(torch.randn(width, width, generator=generator))[0]
        self.levels = lloyd_max(torch.randn(200_000, generator=generator), bits)

    @property
    def name(self) -> str:
        """Short name."""
        return f"TurboQuant-style {self.bits} b"

    def _recode(self, x: Tensor) -> Tensor:
        norm = x.norm(dim=-1, keepdim=True).half().float().clamp_min(1e-8)
        unit = x / norm @ self.turn * self.width**0.5
        edges = (self.levels[1:] + self.levels[:-1]) / 2
        return self.levels[torch.bucketize(unit, edges)] / self.width**0.5 @ self.turn.T * norm

    def recode(self, keys: States, values: States, positions: Tensor) -> tuple[States, States, float]:
        """See ``Peer``."""
        out = [self.rotary.unrotate(self._recode(self.rotary.rotate(k, positions)), positions) for k in keys]
        return out, [self._recode(v) for v in values], self.bits + 16 / self.width


def lloyd_max(sample: Tensor, bits: int) -> Tensor:
    """Levels of the quantiser of least mean squared error for a sample."""
    levels = torch.quantile(sample, (torch.arange(1 << bits) + 0.5) / (1 << bits))
    for _ in range(60):
        index = torch.bucketize(sample, (levels[1:] + levels[:-1]) / 2)
        total = torch.zeros_like(levels).scatter_add_(0, index, sample)
        levels = total / torch.bincount(index, minlength=len(levels)).clamp_min(1)
    return levels


def turboquant(case: CacheCase, bits: float) -> TurboQuant:
    """The most bits that a rate allows."""
    code, _ = nominal(bits, [(code, case.width) for code in range(8, 0, -1)], lambda c, g: c + 16 / g)
    return TurboQuant(code, case.rotary, case.width)


CACHE_METHODS.add(CacheMethod("turboquant", turboquant, explanation="TurboQuant-style: rotated, one norm per token, Lloyd-Max"))
