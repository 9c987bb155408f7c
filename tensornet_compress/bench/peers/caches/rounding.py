"""Caches rounded in groups with a scale and a zero point of 16 bits each: KIVI-style and per token."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tensornet_compress.bench.cache_case import CACHE_METHODS, CacheCase, CacheMethod, States, nominal
from tensornet_compress.kv.rope import Rotary


def round_groups(x: Tensor, bits: int, dim: int, group: int) -> Tensor:
    """Asymmetric round to nearest along ``dim`` in groups (a ragged last group is smaller)."""
    moved = x.movedim(dim, -1)
    parts = []
    for part in moved.split(group, -1):
        low, high = part.amin(-1, keepdim=True), part.amax(-1, keepdim=True)
        scale = ((high - low) / ((1 << bits) - 1)).clamp_min(1e-8).half().float()
        zero = low.half().float()
        parts.append(((part - zero) / scale).round().clamp(0, (1 << bits) - 1) * scale + zero)
    return torch.cat(parts, -1).movedim(-1, dim)


@dataclass
class Kivi:
    """KIVI (2402.02750): keys per channel over groups of tokens, values per token over groups of channels; post-RoPE keys."""

    bits: int
    rotary: Rotary
    group: int = 32

    @property
    def name(self) -> str:
        """Short name."""
        return f"KIVI-style int{self.bits} g{self.group}"

    def recode(self, keys: States, values: States, positions: Tensor) -> tuple[States, States, float]:
        """See ``Peer``."""
        out = [
            self.rotary.unrotate(round_groups(self.rotary.rotate(k, positions), self.bits, 1, self.group), positions)
            for k in keys
        ]
        return out, [round_groups(v, self.bits, 2, self.group) for v in values], self.bits + 32 / self.group


@dataclass
class PerToken:
    """One asymmetric grid per token and head; post-RoPE keys."""

    bits: int
    rotary: Rotary

    @property
    def name(self) -> str:
        """Short name."""
        return f"per-token int{self.bits}"

    def recode(self, keys: States, values: States, positions: Tensor) -> tuple[States, States, float]:
        """See ``Peer``."""
        width = keys[0].shape[-1]
        out = [
            self.rotary.unrotate(round_groups(self.rotary.rotate(k, positions), self.bits, 2, width), positions) for k in keys
        ]
        return out, [round_groups(v, self.bits, 2, width) for v in values], self.bits + 32 / width


def kivi(case: CacheCase, bits: float) -> Kivi:
    """KIVI's grid for a rate: groups of 32, as its authors', or of 64 where only these fit."""
    code, group = nominal(
        bits, [(code, group) for code in (8, 6, 5, 4, 3, 2, 1) for group in (32, 64)], lambda c, g: c + 32 / g
    )
    return Kivi(code, case.rotary, group)


def per_token(case: CacheCase, bits: float) -> PerToken:
    """One grid per token and head."""
    code, _ = nominal(bits, [(code, case.width) for code in range(8, 0, -1)], lambda c, g: c + 32 / g)
    return PerToken(code, case.rotary)


CACHE_METHODS.add(CacheMethod("kivi", kivi, explanation="KIVI-style: keys per channel, values per token, in groups"))
CACHE_METHODS.add(CacheMethod("per-token", per_token, explanation="one min-max grid per token and head"))
