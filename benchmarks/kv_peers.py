"""Re-implemented peers of the quality table: each turns plain states of a block into what it would decode, and counts its bits.

Every scale, zero point and norm is counted as 16 bits. Bases learned by calibration count as profile bytes, not per element.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from tensorly.decomposition import partial_tucker
from torch import Tensor

import tensornet_compress as tnc
from tensornet_compress.kv.live import Curve
from tensornet_compress.kv.moments import layers_of, rows_of
from tensornet_compress.kv.rope import Rotary
from tensornet_compress.network import parse_format

States = list[Tensor]


class Peer(Protocol):
    """``name``, and ``recode``: plain keys and values per layer (heads, tokens, width) -> decoded ones and bits per element."""

    name: str

    def recode(self, keys: States, values: States, positions: Tensor) -> tuple[States, States, float]:
        """See the class."""
        ...


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


class Pca:
    """KVTC-like (2511.01815): a Euclidean principal basis of plain keys and values over ``span`` channels (one layer, or all),
    integer bits by reverse water-filling, a uniform quantiser with calibrated steps."""

    def __init__(self, label: str, moments: dict[str, tuple[Tensor, Tensor]], span: dict[str, int], bits: float, curve: Curve):
        """``moments``: side -> (mean, covariance) over all layers."""
        self.label, self.bits = label, bits
        self.mean = {side: mean for side, (mean, _) in moments.items()}
        self.bases = {side: principal(covariance, span[side]) for side, (_, covariance) in moments.items()}
        self.curve = curve
        self.numbers = sum(b.numel() for bases in self.bases.values() for b, _ in bases)
        deviation = {side: torch.cat([d for _, d in bases]) for side, bases in self.bases.items()}
        if all(len(bases) == 1 for bases in self.bases.values()):
            chosen = waterfill(torch.cat(list(deviation.values())), curve, bits)
            self.chosen = dict(zip(deviation, chosen.split([len(d) for d in deviation.values()])))
        else:
            # Layer by layer every basis gets the same rate: Euclidean errors of different layers do not compare.
            self.chosen = {side: torch.cat([waterfill(d, curve, bits) for _, d in bases]) for side, bases in self.bases.items()}
        self.deviation = deviation
        self.spent = float(torch.cat(list(self.chosen.values())).double().mean())

    @property
    def name(self) -> str:
        """Short name."""
        return f"{self.label} {self.bits:g} b"

    def recode(self, keys: States, values: States, positions: Tensor) -> tuple[States, States, float]:
        """See ``Peer``."""
        out = []
        for side, states in (("key", keys), ("value", values)):
            rows = rows_of(states) - self.mean[side]
            spans = rows.split([len(b) for b, _ in self.bases[side]], 1)
            coefficients = torch.cat([part @ b for part, (b, _) in zip(spans, self.bases[side])], 1)
            step = (self.curve.step[self.chosen[side]] * self.deviation[side]).clamp_min(1e-12)
            half = (1 << self.chosen[side]) / 2
            codes = (coefficients / step).floor().clamp(-half, half - 1) + 0.5
            decoded = torch.where(self.chosen[side] > 0, codes * step, 0.0)
            parts = decoded.split([len(b) for b, _ in self.bases[side]], 1)
            rows = torch.cat([part @ b.T for part, (b, _) in zip(parts, self.bases[side])], 1) + self.mean[side]
            out.append(layers_of(rows, [len(k) for k in states], states[0].shape[-1]))
        return out[0], out[1], self.spent


_principal_cache: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = {}


def principal(covariance: Tensor, span: int) -> list[tuple[Tensor, Tensor]]:
    """Per span of channels (basis as columns, deviation of each coefficient)."""
    key = (covariance.data_ptr(), span)
    if key not in _principal_cache:
        found = []
        for start in range(0, len(covariance), span):
            values, vectors = torch.linalg.eigh(covariance[start : start + span, start : start + span])
            found.append((vectors, values.clamp_min(1e-12).sqrt()))
        _principal_cache[key] = found
    return _principal_cache[key]


def waterfill(deviation: Tensor, curve: Curve, bits: float) -> Tensor:
    """Integer bits 0..8 of least total error at ``bits`` on average."""
    error = deviation.double().square()[:, None] * curve.error.double()
    cost = torch.arange(9)
    low, high = 1e-30, float(error.max()) * 4
    for _ in range(120):
        price = (low * high) ** 0.5
        choice = (error + price * cost).argmin(1)
        low, high = (price, high) if float(choice.double().mean()) > bits else (low, price)
    return (error + high * cost).argmin(1)


@dataclass
class SequenceSvd:
    """Per layer and side, a truncated SVD of the block's plain states: token factor in int4 g64, basis in fp16, all counted."""

    bits: float

    @property
    def name(self) -> str:
        """Short name."""
        return f"per-sequence SVD + int4 {self.bits:g} b"

    def recode(self, keys: States, values: States, positions: Tensor) -> tuple[States, States, float]:
        """See ``Peer``."""
        out, spent = [], 0.0
        for states in (keys, values):
            side = []
            for layer in states:
                rows = rows_of([layer])
                tokens, channels = rows.shape
                per_rank = tokens * (4 + 32 / 64) + channels * 16
                rank = max(1, min(channels, int(self.bits * rows.numel() / per_rank)))
                u, s, v = torch.linalg.svd(rows, full_matrices=False)
                factor = round_groups(u[:, :rank] * s[:rank], 4, 0, 64)
                side.append(layers_of(factor @ v[:rank].half().float(), [len(layer)], layer.shape[-1])[0])
                spent += rank * per_rank / (2 * len(keys) * rows.numel())
            out.append(side)
        return out[0], out[1], spent


@dataclass
class SequenceTrain:
    """Per side, a tensor train over (layer, head, channel, token) of the block's plain states, ranks by bytes, cores in int4
    groups of 64 with offsets; per-channel means in fp16. Calibration-free: everything is counted."""

    bits: float

    @property
    def name(self) -> str:
        """Short name."""
        return f"per-sequence TT + int4 {self.bits:g} b"

    def recode(self, keys: States, values: States, positions: Tensor) -> tuple[States, States, float]:
        """See ``Peer``."""
        out, nbytes = [], 0
        for states in (keys, values):
            tensor = torch.stack(states).movedim(2, 3).contiguous()
            mean = tensor.mean(3, keepdim=True).half()
            network = tnc.to_network(
                tensor - mean.float(), max_bytes=int(self.bits * tensor.numel() / 8) - mean.nbytes, fmt=parse_format("int4g64o")
            )
            nbytes += network.nbytes + mean.nbytes
            out.append(list((network.to_dense(torch.float32).reshape(tensor.shape) + mean.float()).movedim(3, 2)))
        return out[0], out[1], 8 * nbytes / sum(t.numel() for t in (*keys, *values))


@dataclass
class SequenceTucker:
    """Per side, tensorly's Tucker decomposition (truncated HOSVD) over (layer, head, channel, token), every mode keeping the
    same share, core and factors in int4 groups of 64 with 32 bits of scale and zero, per-channel means in fp16."""

    bits: float

    @property
    def name(self) -> str:
        """Short name."""
        return f"per-sequence Tucker + int4 {self.bits:g} b"

    def recode(self, keys: States, values: States, positions: Tensor) -> tuple[States, States, float]:
        """See ``Peer``."""
        out, spent = [], 0.0
        for states in (keys, values):
            tensor = torch.stack(states).movedim(2, 3).contiguous()
            mean = tensor.mean(3, keepdim=True).half()
            ranks = self._ranks(tuple(tensor.shape), int(self.bits * tensor.numel()) - 16 * mean.numel())
            core, factors = partial_tucker((tensor - mean.float()).numpy(), rank=list(ranks), n_iter_max=0, init="svd")[0]
            parts = [torch.from_numpy(part) for part in (core, *factors)]
            rounded = [round_groups(p.reshape(-1), 4, 0, 64).reshape(p.shape) for p in parts]
            spent += sum(p.numel() for p in parts) * (4 + 32 / 64) + 16 * mean.numel()
            dense = rounded[0]
            for mode, factor in enumerate(rounded[1:]):
                dense = torch.tensordot(dense.movedim(mode, -1), factor, dims=([-1], [1])).movedim(-1, mode)
            out.append(list((dense + mean.float()).movedim(3, 2)))
        return out[0], out[1], spent / sum(t.numel() for t in (*keys, *values))

    def _ranks(self, shape: tuple[int, ...], bits: int) -> tuple[int, ...]:
        """The largest ranks in proportion to the modes that fit."""

        def ranks(share: float) -> tuple[int, ...]:
            return tuple(max(1, int(share * size)) for size in shape)

        low, high = 0.0, 1.0
        for _ in range(40):
            middle = (low + high) / 2
            found = ranks(middle)
            numbers = math.prod(found) + sum(r * size for r, size in zip(found, shape))
            low, high = (middle, high) if numbers * (4 + 32 / 64) <= bits else (low, middle)
        return ranks(low)
