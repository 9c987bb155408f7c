"""The codec of live mode: a fixed number of bits for each component of one basis per layer and side, rotary positions left on.

Keys keep their rotary positions, so scores contract queries with the codes directly, q . k = (q A') code; rebuilding keys first
would cost tens of times the attention itself. The price is a flatter spectrum, measured against storage mode in the benchmarks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tensornet_compress.coding.fixed_rate import Curve
from tensornet_compress.coding.planes import PlaneLayout
from tensornet_compress.coding.stored_basis import StoredBasis
from tensornet_compress.decompose.linalg import principal_axes
from tensornet_compress.errors import CheckpointError, TensorNetError
from tensornet_compress.frozen import Shared
from tensornet_compress.kv.rope import Rotary
from tensornet_compress.metric.blocks import symmetric_roots, whiten

_OPERANDS = ("_encoder", "_inverse_step", "_half", "_mean", "rows")
_OWN_SAMPLE = 100_000
_POSITIONS = torch.arange(0, 4096, 32)


@dataclass(frozen=True)
class LiveBasis:
    """The basis of one side of one layer of a live cache.

    ``blocks``: state-space basis vectors as rows, in int8; several blocks make a block-diagonal basis. ``deviation``: of each
    coefficient, in the metric, fp32 (channels,); ``mean``: fp32 (channels,).
    """

    blocks: tuple[StoredBasis, ...]
    deviation: Tensor
    mean: Tensor

    def dense(self) -> Tensor:
        """The decoder's rows, fp64 (channels, channels)."""
        return torch.block_diag(*(block.dense() for block in self.blocks)).double()


def live_bases(covariance: Tensor, mean: Tensor, metric: Tensor, heads: list[int], rotary: Rotary | None) -> list[LiveBasis]:
    """One basis per layer of one side. Keys of a live cache keep their rotary positions, so theirs is an average over these.

    Args:
        covariance: plain states of all units, (n, n); mean: (n,); metric: (units, width, width); heads: of every layer.
        rotary: given for keys: second moments and metric are then averaged over positions, and the mean is no longer constant.
    """
    width = metric.shape[-1]
    bases, unit = [], 0
    for count in heads:
        own = slice(unit * width, (unit + count) * width)
        second, centre, blocks = covariance[own, own].double(), mean[own].double(), metric[unit : unit + count].double()
        if rotary is not None:
            second = second + torch.outer(centre, centre)
            grid = second.view(count, width, count, width).permute(0, 2, 1, 3)
            second = rotary.average(grid, _POSITIONS).permute(0, 2, 1, 3).reshape(count * width, -1)
            blocks, centre = rotary.average(blocks, _POSITIONS), torch.zeros_like(centre)
        bases.append(_live_basis(second, centre, blocks))
        unit += count
    return bases


def _live_basis(covariance: Tensor, mean: Tensor, metric: Tensor) -> LiveBasis:
    forward, backward = symmetric_roots(metric)
    weighted = whiten(covariance, forward)
    rows = principal_axes(weighted)
    deviation = torch.einsum("rc,cd,rd->r", rows, weighted, rows).clamp_min(0).sqrt().float().clamp_min(1e-12)
    # Stored rows are those of the decoder, in plain state space; int8 needs one scale each, and their lengths differ anyway.
    return LiveBasis((StoredBasis.store((rows @ torch.block_diag(*backward)).float()),), deviation, mean.float())


def own_basis(states: Tensor) -> tuple[LiveBasis, Curve]:
    """Head by head principal axes of states (batch, heads, tokens, width), shared by the batch, and the quantiser's curve."""
    rows = states.float().transpose(1, 2).flatten(0, 1)
    mean = rows.mean(0)
    blocks, deviations, samples = [], [], []
    for head in range(rows.shape[1]):
        centred = rows[:, head] - mean[head]
        basis = StoredBasis.store(principal_axes(centred.T @ centred / len(centred)), 0.0)
        coefficients = basis.analyse(centred)
        deviation = coefficients.square().mean(0).sqrt().clamp_min(1e-9)
        samples.append((coefficients / deviation).flatten())
        blocks.append(basis)
        deviations.append(deviation)
    curve = Curve.measure(torch.cat(samples), _OWN_SAMPLE)
    return LiveBasis(tuple(blocks), torch.cat(deviations).float(), mean.flatten()), curve


def live_curve(
    live: dict[str, list[LiveBasis]], kept: list[dict[str, Tensor]], sinks: int, heads: list[int], rotary: Rotary | None
) -> Curve:
    """The quantiser's curve on coefficients of sequences that the bases have not seen.

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
    return Curve.measure(torch.cat(samples))


class SideCode(Shared):
    """Encoder, decoder and contraction operands of one side of one layer at one allocation."""

    def __init__(self, basis: LiveBasis, bits: Tensor, curve: Curve, heads: int):
        """``bits``: int64 (channels,), one of ``ALLOWED`` each."""
        self.heads, self.bits = heads, bits
        self.layout = PlaneLayout.of(bits)
        dense = basis.dense()
        step = (curve.step[bits] * basis.deviation).double()
        half = torch.where(bits > 0, (1 << bits) // 2, 0)
        try:
            self._encoder = torch.linalg.inv(dense).float()
        except torch.linalg.LinAlgError as error:
            raise CheckpointError(f"the basis of a layer cannot be inverted; the profile is damaged ({error})") from error
        self._inverse_step = torch.where(bits > 0, 1 / step.clamp_min(1e-30), 0.0).float()
        self._half, self._mean = half, basis.mean
        operand = dense[self.layout.component] * (step[self.layout.component] * (1 << self.layout.place))[:, None]
        shift = torch.where(bits > 0, (0.5 - half) * step, 0.0)
        # What each field stands for, and behind that what every token shares, fp32 (fields + 1, heads width).
        self.rows = torch.cat([operand.float(), ((shift @ dense).float() + basis.mean)[None]])

    def encode(self, states: Tensor) -> dict[int, Tensor]:
        """States (batch, heads, tokens, width) -> packed bytes by width."""
        rows = states.detach().transpose(1, 2).flatten(2).float()
        self.to(rows.device)
        scaled = ((rows - self._mean) @ self._encoder) * self._inverse_step
        if not torch.isfinite(scaled).all():
            raise TensorNetError("keys or values to compress contain NaN or infinity; check the model's dtype and inputs")
        codes = (scaled.floor() + self._half).clamp_min(0).minimum((2 * self._half - 1).clamp_min(0)).long()
        return self.layout.pack(codes)

    def to(self, device: torch.device) -> None:
        """Keep the operands where the states are."""
        if self.rows.device != device:
            self.layout = self.layout.to(device)
            for name in _OPERANDS:
                setattr(self, name, getattr(self, name).to(device))

    @property
    def head_operand(self) -> Tensor:
        """fp32 (heads, fields, width)."""
        return self.rows[:-1].unflatten(1, (self.heads, -1)).transpose(0, 1)

    @property
    def head_constant(self) -> Tensor:
        """fp32 (heads, width): what every token shares."""
        return self.rows[-1].view(self.heads, -1)

    def decode(self, packed: dict[int, Tensor]) -> Tensor:
        """Packed bytes -> states fp32 (batch, heads, tokens, width)."""
        self.to(packed[4].device)
        fields = self.layout.unpack(packed).float()
        rows = fields.transpose(1, 2) @ self.rows[:-1] + self.rows[-1]
        return rows.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    @property
    def resident_nbytes(self) -> int:
        """Bytes of the operands in memory; shared by every cache of a model."""
        return sum(getattr(self, name).nbytes for name in _OPERANDS)
