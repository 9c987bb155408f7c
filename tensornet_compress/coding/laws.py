"""A fixed family of symbol statistics: generalised Gaussian laws of integers, by mean magnitude and shape.

Codes of weights are close to a law of density ``2^-((|x| / width)^shape)``. To name one of these laws takes a byte, where a
table of its own takes a hundred: so even a small matrix can have a law for each scale that its entries have.

A decoder has to make the very table that the encoder used, on any machine. So only operations that IEEE 754 rounds exactly
(sums, products, quotients, square roots) and whole numbers are used here: no library's exponential.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import NDArray

from tensornet_compress.coding import rans

HALF = 31
"""Largest magnitude with a symbol of its own: symbols are ``code + HALF``."""
ESCAPE = 2 * HALF + 1
SYMBOLS = ESCAPE + 1
LOWEST, HIGHEST, PER_OCTAVE = -6, 2, 4
SCALES = (HIGHEST - LOWEST) * PER_OCTAVE + 1
# Shape of a law -> width / mean magnitude, Gamma(1 / shape) / Gamma(2 / shape) of the density 2^-((x / width)^shape).
_WIDTHS = {0.5: 0.080075502, 0.75: 0.364078299, 1.0: 0.693147181, 1.5: 1.187677797, 2.0: 1.475664627}
SHAPES = tuple(_WIDTHS)
LAWS = SCALES * len(SHAPES)
_SAMPLES = 16
_FRACTION = 12
_ONE = 1 << 40


def law_number(scale: int, shape: int) -> int:
    """Number of the law with mean magnitude ``2^(LOWEST + scale / PER_OCTAVE)`` and shape ``SHAPES[shape]``."""
    return shape * SCALES + scale


@cache
def frequencies(law: int, odd: bool = False) -> NDArray[np.int64]:
    """Frequencies of the symbols of a law, int64 (SYMBOLS,), which sum to ``2**rans.PRECISION``.

    A code too rare for half a slot has none and is escaped; 0, the codes beside it and the escape always have one. ``odd``: of
    levels k that stand for k - sign(k) / 2 (the other quantiser of ``coding/trellis.py``).
    """
    shape, scale = SHAPES[law // SCALES], law % SCALES
    width = _WIDTHS[shape] * _quarter_octaves(LOWEST * PER_OCTAVE + scale)
    places = (np.arange(-_SAMPLES // 2, (HALF + 1) * _SAMPLES - _SAMPLES // 2) + 0.5) / _SAMPLES
    density = _powers_of_half(_raised(np.abs(places) / width, shape))
    if odd:
        # Level 0 reaches a quarter to both sides, level 1 from there to one, and each other one from k - 1 to k.
        quarter, half = _SAMPLES // 4, _SAMPLES // 2
        first = density[half - quarter : half + quarter], density[half + quarter : half + _SAMPLES]
        rest = density[half + _SAMPLES : -half].reshape(HALF - 1, _SAMPLES).sum(1)
        mass = np.concatenate([[part.sum() for part in first], rest])
    else:
        mass = density.reshape(HALF + 1, _SAMPLES).sum(1)
    tail = 2 * int(_powers_of_half(_raised(np.arange(HALF + 1, 4 * HALF) / width, shape)).sum()) * _SAMPLES
    weights = np.concatenate([mass[:0:-1], mass, [tail]])
    total = int(weights.sum())
    counts = (weights * rans.TOTAL + total // 2) // total
    counts[[HALF - 1, HALF + 1, ESCAPE]] = np.maximum(counts[[HALF - 1, HALF + 1, ESCAPE]], 1)
    counts[HALF] += rans.TOTAL - counts.sum()
    return counts


@cache
def all_bits(odd: bool = False) -> NDArray[np.float64]:
    """Bits of each magnitude (with its sign) under each law, float64 (LAWS, HALF + 2); the last column is an escape."""
    counts = np.stack([frequencies(law, odd) for law in range(LAWS)])[:, HALF:]
    bits = rans.PRECISION - np.log2(np.maximum(counts, 1))
    bits[:, -1] += 32
    return np.where(counts > 0, bits, bits[:, -1:])


def _quarter_octaves(steps: int) -> float:
    """``2^(steps / 4)``, by square roots."""
    root = np.sqrt(np.sqrt(2.0))
    return float(2.0 ** (steps // 4) * (1.0, root, root * root, root * root * root)[steps % 4])


def _raised(values: NDArray[np.float64], shape: float) -> NDArray[np.float64]:
    """``values^shape`` for the shapes offered, by square roots."""
    root = np.sqrt(values)
    return {0.5: root, 0.75: root * np.sqrt(root), 1.0: values, 1.5: values * root, 2.0: values * values}[shape]


def _powers_of_half(exponents: NDArray[np.float64]) -> NDArray[np.int64]:
    """``2^-exponents`` as whole numbers of ``1 / 2^40``."""
    fixed = np.floor(np.minimum(exponents, 60.0) * (1 << _FRACTION)).astype(np.int64)
    return _fractions()[fixed & ((1 << _FRACTION) - 1)] >> (fixed >> _FRACTION)


@cache
def _fractions() -> NDArray[np.int64]:
    """``2^(-k / 2^12)`` for all k, as whole numbers of ``1 / 2^40``."""
    powers, root = np.ones(1), 0.5
    for _ in range(_FRACTION):
        root = float(np.sqrt(root))
        # From coarse to fine: after the b-th square root the table holds every multiple of 2^-b.
        powers = np.stack([powers, powers * root], 1).ravel()
    return np.floor(powers * _ONE).astype(np.int64)
