"""The entropy-coded quantiser: one step for all components, a dead zone, and calibrated symbol statistics.

Coefficients arrive in a space where a unit error costs the same everywhere, so the optimal allocation at any rate (reverse
water-filling; equal slope) is a single step shared by all: a component of scale s gets about log2(s / step) bits, fractions
included, and components far below the step get none. Each component takes its statistics from a class chosen by s / step.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tensornet_compress.coding import rans
from tensornet_compress.errors import CheckpointError, TensorNetError

LOWEST, HIGHEST, PER_OCTAVE = -6.0, 2.0, 4
CLASSES = int((HIGHEST - LOWEST) * PER_OCTAVE) + 1
HALF = 31
ESCAPE = 2 * HALF + 1
SYMBOLS = ESCAPE + 1
ROUNDING = 0.42
_MAX_SHIFT = 6
_MAX_CODE = 1 << 30


@dataclass(frozen=True)
class Classes:
    """How the components of one side are coded at one step."""

    active: Tensor
    """Indices of the components that are coded, int64 (active,)."""
    table: Tensor
    """Class of each active component, int64 (active,)."""
    shift: Tensor
    """Low bits of each active component that are stored raw, int64 (active,)."""


def classify(scale: Tensor, step: float) -> Classes:
    """Classes of components of mean magnitude ``scale`` (components,) at ``step``."""
    octave = (scale.double() / step).clamp_min(1e-30).log2()
    active = torch.nonzero(octave > LOWEST).flatten()
    octave = octave[active]
    shift = (octave - HIGHEST).ceil().clamp(0, _MAX_SHIFT)
    table = ((octave - shift - LOWEST) * PER_OCTAVE).round().clamp(0, CLASSES - 1)
    return Classes(active, table.long(), shift.long())


@dataclass
class Statistics:
    """Symbol statistics of every class, counted on calibration data: what the file of a profile holds."""

    counts: Tensor = field(default_factory=lambda: torch.zeros(CLASSES, SYMBOLS))
    sums: Tensor = field(default_factory=lambda: torch.zeros(CLASSES, SYMBOLS))

    def count(self, coefficients: Tensor, scale: Tensor, step: float) -> None:
        """Add coefficients (tokens, components) quantised at ``step``."""
        classes = classify(scale, step)
        values = coefficients[:, classes.active].float() / step
        high, _ = split(quantise(values), classes.shift)
        coarse = values / (1 << classes.shift)
        symbol = torch.where(high.abs() <= HALF, high + HALF, ESCAPE)
        cell = (classes.table * SYMBOLS + symbol).flatten()
        self.counts.view(-1).scatter_add_(0, cell, torch.ones(cell.numel()))
        self.sums.view(-1).scatter_add_(0, cell, coarse.flatten())

    def finish(self) -> tuple[Tensor, Tensor]:
        """(frequency uint16 (classes, symbols) summing to ``2**rans.PRECISION``; reconstruction offset fp16 (classes,
        HALF + 1)).

        Magnitudes are pooled over signs. A Laplace law of the class's scale fills what was seen too rarely; symbols whose
        expected count stays below half a slot are left to the escape.
        """
        magnitude = torch.arange(-HALF, HALF + 1).abs().double()
        middle = torch.linspace(LOWEST, HIGHEST, CLASSES, dtype=torch.float64)[:, None].exp2()
        prior = torch.where(
            magnitude == 0,
            1 - torch.exp(-(1 - ROUNDING) / middle),
            0.5 * (torch.exp(-(magnitude - ROUNDING) / middle) - torch.exp(-(magnitude + 1 - ROUNDING) / middle)),
        )
        seen = self.counts[:, :ESCAPE].double()
        seen = (seen + seen.flip(1)) / 2
        weight = seen + 64 * prior
        weight = weight / weight.sum(1, keepdim=True)
        floor = 0.5 / (1 << rans.PRECISION)
        kept = torch.where(weight >= floor, weight, 0.0)
        escape = (1 - kept.sum(1, keepdim=True)).clamp_min(floor)
        frequency = torch.from_numpy(rans.normalise(torch.cat([kept, escape], 1).numpy()).astype(np.int32))
        sums = self.sums[:, :ESCAPE].double()
        sums = (sums - sums.flip(1))[:, HALF:] / 2
        offset = (sums + 0.0) / seen[:, HALF:].clamp_min(1) - torch.arange(HALF + 1)
        offset = torch.where((seen[:, HALF:] > 16) & (torch.arange(HALF + 1) > 0), offset, 0.0).clamp(-0.5, 0.5)
        return frequency.to(torch.int16), offset.to(torch.float16)


def quantise(values: Tensor) -> Tensor:
    """Coefficients in units of the step -> int64 codes, rounding towards zero a little (a dead zone)."""
    return (values.sign() * (values.abs() + ROUNDING).floor().clamp_max(_MAX_CODE)).long()


def split(codes: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """Codes (tokens, active) -> (high part rounded to nearest, low bits); ``(high << shift) + low - half`` restores."""
    moved = codes + ((1 << shift) >> 1)
    high = moved >> shift
    return high, moved - (high << shift)


class Quantiser:
    """Codes coefficient matrices with the statistics of a profile."""

    def __init__(self, frequency: Tensor, offset: Tensor):
        """``frequency``, ``offset``: as given by ``Statistics.finish``."""
        if frequency.shape != (CLASSES, SYMBOLS) or int(frequency.long().sum(1).ne(1 << rans.PRECISION).sum()):
            raise CheckpointError(f"symbol statistics of shape {tuple(frequency.shape)} do not sum up; the profile is damaged")
        uniform = np.zeros((_MAX_SHIFT, SYMBOLS), np.int64)
        for shift in range(1, _MAX_SHIFT + 1):
            uniform[shift - 1, : 1 << shift] = 1 << (rans.PRECISION - shift)
        both = np.concatenate([frequency.numpy().astype(np.int64), uniform])
        self.tables = rans.Tables.from_frequencies(both)
        probability = frequency.double() / (1 << rans.PRECISION)
        self.cost = torch.where(probability > 0, -probability.clamp_min(1e-12).log2(), 0.0)
        self.cost[:, ESCAPE] += 32
        self.entropy = (probability * self.cost).sum(1)
        self.offset = offset.float()
        self.available = frequency > 0

    def expected_bits(self, scale: Tensor, step: float) -> float:
        """Calibrated bits per token of components of mean magnitude ``scale`` (components,) at ``step``."""
        classes = classify(scale, step)
        return float((self.entropy[classes.table] + classes.shift).sum())

    def bits(self, coefficients: Tensor, scale: Tensor, step: float) -> float:
        """Bits that these coefficients (tokens, components) would take at ``step``, without coding them."""
        classes = classify(scale, step)
        symbol, _, _ = self._symbols(coefficients, classes, step)
        return float(self.cost[classes.table.expand_as(symbol), symbol].sum()) + int(classes.shift.sum()) * len(coefficients)

    def encode(self, coefficients: Tensor, scale: Tensor, step: float) -> tuple[Tensor, Tensor]:
        """Coefficients (tokens, components) -> (entropy-coded bytes uint8, escaped high codes int32)."""
        classes = classify(scale, step)
        symbol, low, high = self._symbols(coefficients, classes, step)
        stream = torch.cat([symbol, low[:, classes.shift > 0]], 1).to(torch.uint8).numpy()
        coded = rans.encode(stream, np.zeros(len(coefficients), np.int64), _columns(classes), self.tables)
        return torch.from_numpy(coded), high[symbol == ESCAPE].to(torch.int32)

    def decode(self, coded: Tensor, escaped: Tensor, scale: Tensor, step: float, tokens: int) -> Tensor:
        """The inverse of ``encode``: fp32 (tokens, components), reconstructed at the calibrated centroids.

        Raises:
            CheckpointError: the bytes are damaged.
        """
        classes = classify(scale, step)
        stream = torch.from_numpy(rans.decode(coded.cpu().numpy(), np.zeros(tokens, np.int64), _columns(classes), self.tables))
        count, shifted = len(classes.active), torch.nonzero(classes.shift).flatten()
        symbol, packed_low = stream.split([count, len(shifted)], 1)
        symbol = symbol.long()
        high = symbol - HALF
        where = symbol == ESCAPE
        if int(where.sum()) != escaped.numel():
            raise CheckpointError(
                f"a block names {int(where.sum())} escaped numbers and holds {escaped.numel()}; it is damaged"
            )
        high[where] = escaped.to(torch.int64).cpu()
        offset = self.offset[classes.table.expand_as(high), high.abs().clamp_max(HALF)] * high.sign()
        values = high + torch.where(high.abs() <= HALF, offset, 0.0)
        if len(shifted):
            moved = (high[:, shifted] << classes.shift[shifted]) + packed_low - ((1 << classes.shift[shifted]) >> 1)
            values[:, shifted] = moved.float()
        out = torch.zeros(tokens, len(scale))
        out[:, classes.active] = values.float() * step
        return out

    def _symbols(self, coefficients: Tensor, classes: Classes, step: float) -> tuple[Tensor, Tensor, Tensor]:
        if not torch.isfinite(coefficients).all():
            raise TensorNetError("keys or values to compress contain NaN or infinity; check the model's dtype and inputs")
        high, low = split(quantise(coefficients[:, classes.active].float() / step), classes.shift)
        symbol = torch.where(high.abs() <= HALF, high + HALF, ESCAPE)
        usable = self.available[classes.table.expand_as(symbol), symbol]
        return torch.where(usable, symbol, ESCAPE), low, high


def _columns(classes: Classes) -> NDArray[np.int64]:
    """Table of every symbol of a token: the high parts, then the raw low parts (uniform tables)."""
    shifted = classes.shift[classes.shift > 0]
    return torch.cat([classes.table, CLASSES - 1 + shifted]).numpy()
