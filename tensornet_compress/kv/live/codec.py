"""The codec of live mode: a fixed number of bits for each component of one basis per layer and side, rotary positions left on.

Keys keep their rotary positions, so scores contract queries with the codes directly, q . k = (q A') code; rebuilding keys first
would cost tens of times the attention itself. The price is a flatter spectrum, measured against storage mode in the benchmarks.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from tensornet_compress.coding.planes import FIELDS, PlaneLayout
from tensornet_compress.errors import TensorNetError
from tensornet_compress.kv.basis import LiveBasis, Shared, StoredBasis, principal_rows, smallest
from tensornet_compress.kv.rope import Rotary

ALLOWED = tuple(sorted(FIELDS))
_GRID = torch.linspace(0.02, 2.4, 120)
_CURVE_VALUES = 200_000
_OWN_CURVE_VALUES = 100_000


@dataclass(frozen=True)
class Curve:
    """The fixed-rate quantiser measured on calibration data, for unit deviation: ``error`` and best ``step`` by bits (9,)."""

    error: Tensor
    step: Tensor

    @staticmethod
    def measure(sample: Tensor) -> Curve:
        """``sample``: coefficients divided by their deviation, any shape; every bit count gets its best uniform step."""
        values = sample.float().flatten()
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

    @staticmethod
    def of_sequences(
        live: dict[str, list[LiveBasis]], kept: list[dict[str, Tensor]], sinks: int, heads: list[int], rotary: Rotary | None
    ) -> Curve:
        """Measured on coefficients of sequences that the bases have not seen.

        ``kept``: per sequence and side, plain rows (tokens, channels) that begin after ``sinks`` tokens.
        """
        samples = []
        for rows in kept:
            for side, bases in live.items():
                states = rows[side].float()
                if side == "key" and rotary is not None:
                    units = states.unflatten(1, (sum(heads), -1))
                    states = rotary.rotate(units, torch.arange(sinks, sinks + len(states))[:, None]).flatten(1)
                for basis, part in zip(bases, states.split([b.mean.numel() for b in bases], 1)):
                    encoder = torch.linalg.inv(basis.dense()).float()
                    unit = ((part - basis.mean) @ encoder) / basis.deviation
                    # Directions that calibration hardly saw say nothing about the shape of the ones that get bits.
                    samples.append(unit[:, basis.deviation > basis.deviation.median()].flatten())
        return Curve.measure(_thinned(torch.cat(samples), _CURVE_VALUES))


def own_basis(states: Tensor) -> tuple[LiveBasis, Curve]:
    """Head by head principal axes of states (batch, heads, tokens, width), shared by the batch, and the quantiser's curve."""
    rows = states.float().transpose(1, 2).flatten(0, 1)
    mean = rows.mean(0)
    blocks, deviations, samples = [], [], []
    for head in range(rows.shape[1]):
        centred = rows[:, head] - mean[head]
        basis = StoredBasis.store(principal_rows(centred.T @ centred / len(centred)), 0.0)
        coefficients = basis.analyse(centred)
        deviation = coefficients.square().mean(0).sqrt().clamp_min(1e-9)
        samples.append((coefficients / deviation).flatten())
        blocks.append(basis)
        deviations.append(deviation)
    curve = Curve.measure(_thinned(torch.cat(samples), _OWN_CURVE_VALUES))
    return LiveBasis(tuple(blocks), torch.cat(deviations).float(), mean.flatten()), curve


def _thinned(sample: Tensor, count: int) -> Tensor:
    return sample[:: max(1, len(sample) // count)]


def check_bits(bits: float) -> None:
    """Raise ``TensorNetError`` for a rate that live caches do not have."""
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

    choice = (error + smallest(fits, 1e-30, float(variance.max()) * 4, 120) * cost).argmin(1)
    left = int(bits * len(variance)) - int(cost[choice].sum())
    upper = (choice + 1).clamp_max(len(ALLOWED) - 1)
    gain = error.gather(1, choice[:, None]) - error.gather(1, upper[:, None])
    for component in gain.flatten().argsort(descending=True).tolist():
        more = int(cost[upper[component]] - cost[choice[component]])
        if 0 < more <= left:
            choice[component], left = upper[component], left - more
    return cost[choice].long()


class SideCode(Shared):
    """Encoder, decoder and contraction operands of one side of one layer at one allocation."""

    def __init__(self, basis: LiveBasis, bits: Tensor, curve: Curve, heads: int):
        """``bits``: int64 (channels,), one of ``ALLOWED`` each."""
        self.heads, self.bits = heads, bits
        self.layout = PlaneLayout.of(bits)
        dense = basis.dense()
        step = (curve.step[bits] * basis.deviation).double()
        half = torch.where(bits > 0, (1 << bits) // 2, 0)
        self._encoder = torch.linalg.inv(dense).float()
        self._inverse_step = torch.where(bits > 0, 1 / step.clamp_min(1e-30), 0.0).float()
        self._half, self._mean = half, basis.mean
        operand = dense[self.layout.component] * (step[self.layout.component] * (1 << self.layout.place))[:, None]
        shift = torch.where(bits > 0, (0.5 - half) * step, 0.0)
        self._operand, self._constant = operand.float(), (shift @ dense).float() + basis.mean

    def encode(self, states: Tensor) -> dict[int, Tensor]:
        """States (batch, heads, tokens, width) -> packed bytes by width."""
        rows = states.transpose(1, 2).flatten(2).float()
        self.to(rows.device)
        scaled = ((rows - self._mean) @ self._encoder) * self._inverse_step
        if not torch.isfinite(scaled).all():
            raise TensorNetError("keys or values to compress contain NaN or infinity; check the model's dtype and inputs")
        codes = (scaled.floor() + self._half).clamp_min(0).minimum((2 * self._half - 1).clamp_min(0)).long()
        return self.layout.pack(codes)

    def to(self, device: torch.device) -> None:
        """Keep the operands where the states are."""
        if self._operand.device != device:
            self.layout = self.layout.to(device)
            for name in ("_encoder", "_inverse_step", "_half", "_mean", "_operand", "_constant"):
                setattr(self, name, getattr(self, name).to(device))
            for name in ("head_operand", "head_constant"):
                self.__dict__.pop(name, None)

    @cached_property
    def head_operand(self) -> Tensor:
        """fp32 (heads, rows, width)."""
        return self._operand.view(self.layout.count, self.heads, -1).transpose(0, 1)

    @cached_property
    def head_constant(self) -> Tensor:
        """fp32 (heads, width): what every token shares."""
        return self._constant.view(self.heads, -1)

    def decode(self, packed: dict[int, Tensor]) -> Tensor:
        """Packed bytes -> states fp32 (batch, heads, tokens, width)."""
        self.to(packed[4].device)
        fields = self.layout.unpack(packed).float()
        rows = fields.transpose(1, 2) @ self._operand + self._constant
        return rows.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    @property
    def resident_nbytes(self) -> int:
        """Bytes of the operands in memory; shared by every cache of a model."""
        return sum(t.nbytes for t in (self._encoder, self._inverse_step, self._half, self._mean, self._operand, self._constant))
