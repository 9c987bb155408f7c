"""Without calibration: bases made from the sequence itself, stored with it and counted."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tensornet_compress.coding.entropy import Quantiser, Statistics
from tensornet_compress.coding.rans import lane_count
from tensornet_compress.kv.live.codec import Curve, LiveBasis
from tensornet_compress.kv.payload import Payload, row_payload, scalar
from tensornet_compress.kv.profile.moments import layers_of, rows_of
from tensornet_compress.kv.profile.tree import StoredBasis, principal_rows

_STEPS = 24
_GAUSSIAN = 0.5 * math.log2(2 * math.pi * math.e)
"""Bits of a Gaussian coefficient as large as the step."""


def own_basis(states: Tensor) -> tuple[LiveBasis, Curve]:
    """Head by head principal axes of states (batch, heads, tokens, width), shared by the batch, and the quantiser's curve."""
    blocks, deviations = [], []
    rows = states.float().transpose(1, 2).flatten(0, 1)
    mean = rows.mean(0)
    samples = []
    for head in range(rows.shape[1]):
        centred = rows[:, head] - mean[head]
        basis = StoredBasis.store(principal_rows(centred.T @ centred / len(centred)), 0.0)
        coefficients = basis.analyse(centred)
        deviation = coefficients.square().mean(0).sqrt().clamp_min(1e-9)
        samples.append((coefficients / deviation).flatten())
        blocks.append(basis)
        deviations.append(deviation)
    sample = torch.cat(samples)
    curve = Curve.measure(sample[:: max(1, len(sample) // 100_000)])
    return LiveBasis(tuple(blocks), torch.cat(deviations).float(), mean.flatten()), curve


NATIVE = -1
"""In place of a rank: the unit's own channels."""
_SCALE_BITS = 16
_LEAST_GAIN = 1e-6


class FreeCodec:
    """Storage without a profile: entropy-coded coefficients, per block and unit (one KV head of one layer) in the unit's own
    channels or, where a block is long enough to pay for one, in a truncated principal basis in int8. One step, in units of the
    spread of each unit, serves all: without calibration the same relative error everywhere is the best guess of what errors
    cost. The target counts everything in the payload."""

    def __init__(self, bits: float):
        self.bits = bits
        self.quantiser = Quantiser(*Statistics().finish())

    def encode(self, keys: list[Tensor], values: list[Tensor]) -> Payload:
        """Plain keys and values, per layer (heads, tokens, channels), -> payload. The least step that meets the target is used;
        components below it are dropped with their basis vectors."""
        sides = {side: _principal(states) for side, states in (("key", keys), ("value", values))}
        tokens = keys[0].shape[1]
        target = self.bits * sum(side.centred.numel() for side in sides.values())
        heads = torch.tensor([len(k) for k in keys], dtype=torch.int16)
        low, high = 1e-6, max(float(side.scale.max()) for side in sides.values()) * 4 + 1e-6
        for _ in range(_STEPS):
            step = float(scalar((low * high) ** 0.5))
            spent = sum(
                self._bits(_kept(side, step), step) + 8 * (side.mean.nbytes + side.gain.nbytes) for side in sides.values()
            )
            low, high = (step, high) if spent > target else (low, step)
            if high / low < 1.01:
                break
        step = float(scalar(high))
        tensors = {"step": scalar(step), "heads": heads}
        for side, found in sides.items():
            kept = _kept(found, step)
            coded, escaped = self.quantiser.encode(kept.coefficients, kept.scale.float(), step)
            tensors |= {
                f"{side}.mean": found.mean,
                f"{side}.gain": found.gain,
                f"{side}.codes": kept.basis.codes,
                f"{side}.scale": kept.basis.scale,
            }
            tensors |= {f"{side}.magnitude": kept.scale, f"{side}.coded": coded, f"{side}.escaped": escaped}
            tensors[f"{side}.ranks"] = kept.ranks
        return row_payload(tokens, **tensors)

    def _bits(self, kept: _Kept, step: float) -> float:
        stored = (kept.basis.codes, kept.basis.scale, kept.scale, kept.ranks)
        lanes = 32 * lane_count(kept.coefficients.numel())
        return self.quantiser.bits(kept.coefficients, kept.scale.float(), step) + lanes + 8 * sum(t.nbytes for t in stored)

    def decode(self, payload: Payload) -> tuple[list[Tensor], list[Tensor]]:
        """Payload -> plain keys and values, per layer fp32 (heads, tokens, channels)."""
        out = []
        for side in ("key", "value"):
            part = {name.split(".", 1)[1]: t for name, t in payload.tensors.items() if name.startswith(f"{side}.")}
            ranks = part["ranks"].tolist()
            scale = part["magnitude"].float()
            step = float(payload.tensors["step"])
            coefficients = self.quantiser.decode(part["coded"], part["escaped"], scale, step, payload.tokens)
            width = part["mean"].shape[1]
            dense = part["codes"].float() * part["scale"].float()[:, None]
            bases = iter(dense.split([rank for rank in ranks if rank != NATIVE], 0))
            found = coefficients.split([width if rank == NATIVE else rank for rank in ranks], 1)
            units = [c if rank == NATIVE else c @ next(bases) for c, rank in zip(found, ranks)]
            rows = torch.cat([u * g.float() + m.float() for u, g, m in zip(units, part["gain"], part["mean"])], 1)
            out.append(layers_of(rows, payload.tensors["heads"].tolist(), width))
        return out[0], out[1]


@dataclass(frozen=True)
class _Side:
    mean: Tensor
    gain: Tensor
    centred: Tensor
    vectors: Tensor
    scale: Tensor
    power: Tensor
    native_power: Tensor


@dataclass(frozen=True)
class _Kept:
    basis: StoredBasis
    coefficients: Tensor
    scale: Tensor
    ranks: Tensor


def _principal(states: list[Tensor]) -> _Side:
    rows = rows_of([s.float().cpu() for s in states]).unflatten(1, (-1, states[0].shape[-1]))
    mean = rows.mean(0).half()
    centred = (rows - mean.float()).transpose(0, 1)
    gain = centred.square().mean((1, 2)).sqrt().clamp_min(_LEAST_GAIN).half()
    centred = centred / gain.float()[:, None, None]
    vectors = torch.stack([principal_rows(unit.T @ unit / len(unit)) for unit in centred])
    turned = torch.einsum("utc,urc->utr", centred, vectors)
    power, native = turned.square().mean(1).double(), centred.square().mean(1).double()
    return _Side(mean, gain, centred, vectors, turned.abs().amax(1), power, native)


def _kept(side: _Side, step: float) -> _Kept:
    """Per unit the cheaper of its own channels and a principal basis, in bits and in squared error at the exchange rate of a
    uniform quantiser with this step; of a basis only the vectors that are worth their own bytes."""
    tokens, width = side.centred.shape[1:]
    price = 6 / (math.log(2) * step**2)  # -d bits / d error of a coefficient coded with error step^2 / 12
    native = _lagrangian(side.native_power, step, price, tokens).sum(1)
    coded = _lagrangian(side.power, step, price, tokens) + 8 * (width + 4)
    dropped = price * tokens * side.power
    worth = coded < dropped
    principal = torch.where(worth, coded, dropped).sum(1)
    stays = native <= principal
    worth[stays] = False
    ranks = torch.where(stays, NATIVE, worth.sum(1))
    basis = StoredBasis.store(side.vectors[worth].view(-1, width), 0.0)
    bases = iter(basis.dense().split(ranks[~stays].tolist(), 0))
    parts = [unit if keep else unit @ torch.linalg.pinv(next(bases)) for unit, keep in zip(side.centred, stays.tolist())]
    coefficients = torch.cat(parts, 1)
    scale = coefficients.abs().mean(0).clamp_min(step / 16).half()
    return _Kept(basis, coefficients, scale, ranks.to(torch.int16))


def _lagrangian(power: Tensor, step: float, price: float, tokens: int) -> Tensor:
    """Expected bits plus priced error of coefficients of mean square ``power`` over all tokens."""
    bits = (0.5 * (power / step**2).clamp_min(1e-12).log2() + _GAUSSIAN).clamp_min(0.0)
    return tokens * (bits + price * power.clamp_max(step**2 / 12)) + _SCALE_BITS
