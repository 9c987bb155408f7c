"""Whole bits for each of many components: uniform quantisers of best step, and the bits that lose least at a given rate."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tensornet_compress.bisection import least_kept
from tensornet_compress.coding.planes import FIELDS
from tensornet_compress.errors import TensorNetError

ALLOWED = tuple(sorted(FIELDS))
_GRID = torch.linspace(0.02, 2.4, 120)
_SAMPLE = 200_000


@dataclass(frozen=True)
class Curve:
    """The fixed-rate quantiser measured on calibration data, for unit deviation: ``error`` and best ``step`` by bits (9,)."""

    error: Tensor
    step: Tensor

    @staticmethod
    def measure(sample: Tensor, count: int = _SAMPLE) -> Curve:
        """``sample``: coefficients divided by their deviation, any shape; every bit count gets its best uniform step. At most
        about ``count`` of them are looked at."""
        values = sample.float().flatten()
        values = values[:: max(1, len(values) // count)]
        error, step = torch.ones(9), torch.zeros(9)
        error[0] = values.square().mean()
        for bits in range(1, 9):
            half = 1 << (bits - 1)
            tried = torch.stack(
                [((values / s).floor().clamp(-half, half - 1).add(0.5).mul(s) - values).square().mean() for s in _GRID]
            )
            best = int(tried.argmin())
            error[bits], step[bits] = tried[best], _GRID[best]
        return Curve(error, step)


def check_bits(bits: float) -> None:
    """Raise ``TensorNetError`` for a rate that whole bits do not give."""
    if not 0.05 <= bits <= 8:
        raise TensorNetError(f"asked for {bits} bits per element; live caches take 0.05 to 8")


def allocate(deviation: Tensor, curve: Curve, bits: float) -> Tensor:
    """Bits of every component, int64 (components,), with the least total error at ``bits`` on average (never more).

    Lagrangian search over the allowed bit counts, then a greedy fill of what is left.

    Raises:
        TensorNetError: ``bits`` outside 0.05 .. 8.
    """
    check_bits(bits)
    variance = deviation.double().square()
    cost = torch.tensor(ALLOWED, dtype=torch.float64)
    error = variance[:, None] * curve.error[list(ALLOWED)].double()

    def fits(price: float) -> bool:
        return float(cost[(error + price * cost).argmin(1)].mean()) <= bits

    price = least_kept(fits, 1e-30, float(variance.max()) * 4, steps=120)
    choice = (error + price * cost).argmin(1)
    left = int(bits * len(variance)) - int(cost[choice].sum())
    upper = (choice + 1).clamp_max(len(ALLOWED) - 1)
    gain = error.gather(1, choice[:, None]) - error.gather(1, upper[:, None])
    for component in gain.flatten().argsort(descending=True).tolist():
        more = int(cost[upper[component]] - cost[choice[component]])
        if 0 < more <= left:
            choice[component], left = upper[component], left - more
    return cost[choice].long()
