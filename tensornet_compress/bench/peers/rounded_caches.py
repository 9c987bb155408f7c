"""Caches rounded in small groups: KIVI-style, one grid per token, and TurboQuant-style; keys with rotary positions on."""

from __future__ import annotations

import torch
from torch import Tensor

from tensornet_compress.bench.cache_case import CACHE_METHODS, CacheCase, CacheCoder, nominal
from tensornet_compress.bench.registry import Method


def round_groups(x: Tensor, bits: int, dim: int, group: int) -> Tensor:
    """Asymmetric round to nearest along ``dim`` in groups (a ragged last group is smaller), scale and zero point in fp16."""
    moved = x.movedim(dim, -1)
    parts = []
    for part in moved.split(group, -1):
        low, high = part.amin(-1, keepdim=True), part.amax(-1, keepdim=True)
        scale = ((high - low) / ((1 << bits) - 1)).clamp_min(1e-8).half().float()
        zero = low.half().float()
        parts.append(((part - zero) / scale).round().clamp(0, (1 << bits) - 1) * scale + zero)
    return torch.cat(parts, -1).movedim(-1, dim)


def kivi(case: CacheCase, bits: float) -> CacheCoder:
    """KIVI (2402.02750): keys per channel over groups of tokens, values per token over groups of channels; groups of 32, as its
    authors', or of 64 where only these fit."""
    grids = [(code, group) for code in (8, 6, 5, 4, 3, 2, 1) for group in (32, 64)]
    code, group = nominal(bits, grids, lambda c, g: c + 32 / g)
    form = f"KIVI-style int{code} g{group}"
    return case.rounded(
        form, code + 32 / group, lambda x: round_groups(x, code, 1, group), lambda x: round_groups(x, code, 2, group)
    )


def per_token(case: CacheCase, bits: float) -> CacheCoder:
    """One asymmetric grid per token and head."""
    width = case.width
    code, _ = nominal(bits, [(code, width) for code in range(8, 0, -1)], lambda c, g: c + 32 / g)
    return case.rounded(f"per-token int{code}", code + 32 / width, lambda x: round_groups(x, code, 2, width))


def turboquant(case: CacheCase, bits: float) -> CacheCoder:
    """TurboQuant-style (2504.19874): a random rotation per head, one norm per token, Lloyd-Max levels of a Gaussian."""
    width = case.width
    code, _ = nominal(bits, [(code, width) for code in range(8, 0, -1)], lambda c, g: c + 16 / g)
    generator = torch.Generator().manual_seed(0)
    turn = torch.linalg.qr(torch.randn(width, width, generator=generator))[0]
    levels = lloyd_max(torch.randn(200_000, generator=generator), code)
    edges = (levels[1:] + levels[:-1]) / 2

    def coded(x: Tensor) -> Tensor:
        norm = x.norm(dim=-1, keepdim=True).half().float().clamp_min(1e-8)
        unit = x / norm @ turn * width**0.5
        return levels[torch.bucketize(unit, edges)] / width**0.5 @ turn.T * norm

    return case.rounded(f"TurboQuant-style {code} b", code + 16 / width, coded)


def lloyd_max(sample: Tensor, bits: int) -> Tensor:
    """Levels of the quantiser of least mean squared error for a sample."""
    levels = torch.quantile(sample, (torch.arange(1 << bits) + 0.5) / (1 << bits))
    for _ in range(60):
        index = torch.bucketize(sample, (levels[1:] + levels[:-1]) / 2)
        total = torch.zeros_like(levels).scatter_add_(0, index, sample)
        levels = total / torch.bincount(index, minlength=len(levels)).clamp_min(1)
    return levels


CACHE_METHODS.add(Method("kivi", kivi, "KIVI-style: keys per channel, values per token, in groups"))
CACHE_METHODS.add(Method("per-token", per_token, "one min-max grid per token and head"))
CACHE_METHODS.add(Method("turboquant", turboquant, "TurboQuant-style: rotated, one norm per token, Lloyd-Max"))
