"""Storage without calibration: bases made from each block itself, stored with it and counted."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tensornet_compress.coding.cache_quantiser import Quantiser, Statistics
from tensornet_compress.coding.rans import lane_count
from tensornet_compress.coding.stored_basis import StoredBasis
from tensornet_compress.decompose.linalg import principal_axes
from tensornet_compress.kv.profile.tree import layers_of, rows_of
from tensornet_compress.kv.storage.codec import Payload

NATIVE = -1
"""In place of a rank: the unit's own channels."""
_STEPS = 24
_GAUSSIAN = 0.5 * math.log2(2 * math.pi * math.e)
"""Bits of a Gaussian coefficient as large as the step."""
_SCALE_BITS = 16
_LEAST_GAIN = 1e-6


class FreeCodec:
    """Storage without a profile: entropy-coded coefficients, per block and unit (one KV head of one layer) in the unit's own
    channels or, where a block is long enough to pay for one, in a truncated principal basis in int8. One step, in units of the
    spread of each unit, serves all: without calibration the same relative error everywhere is the best guess of what errors
    cost. The target counts everything in the payload.

    A payload holds ``step`` (fp32), ``heads`` (int16, KV heads of each layer) and of each side, as ``key.`` or ``value.``:
    ``mean`` (fp16, units x width) and ``gain`` (fp16, of each unit): states are decoded ones times gain, plus mean; ``ranks``
    (int16, of each unit; -1: its own channels); ``codes`` (int8) and ``scale`` (fp16), the basis vectors of all units below one
    another; ``magnitude`` (fp16), the scale of each coefficient; ``coded`` and ``escaped``, as in a payload with a profile.
    """

    def __init__(self, bits: float):
        self.bits = bits
        self.quantiser = Quantiser(*Statistics().finish())

    def encode(self, keys: list[Tensor], values: list[Tensor]) -> Payload:
        """See ``BlockCodec``. The least step that meets the target is used; components below it are dropped with their basis
        vectors."""
        sides = {"key": _Side.of(keys), "value": _Side.of(values)}
        target = self.bits * sum(side.centred.numel() for side in sides.values())
        low, high = 1e-6, max(float(side.scale.max()) for side in sides.values()) * 4 + 1e-6
        for _ in range(_STEPS):
            step = _stored_step((low * high) ** 0.5)
            spent = sum(
                self._bits(side.kept(step), step) + 8 * (side.mean.nbytes + side.gain.nbytes) for side in sides.values()
            )
            low, high = (step, high) if spent > target else (low, step)
            if high / low < 1.01:
                break
        step = _stored_step(high)
        tensors = {"step": torch.tensor([step]), "heads": torch.tensor([len(k) for k in keys], dtype=torch.int16)}
        for name, side in sides.items():
            kept = side.kept(step)
            coded, escaped = self.quantiser.encode(kept.coefficients, kept.scale.float(), step)
            parts = {"mean": side.mean, "gain": side.gain, "codes": kept.basis.codes, "scale": kept.basis.scale}
            parts |= {"magnitude": kept.scale, "coded": coded, "escaped": escaped, "ranks": kept.ranks}
            tensors |= {f"{name}.{part}": tensor for part, tensor in parts.items()}
        return Payload.of(keys[0].shape[1], **tensors)

    def _bits(self, kept: _Kept, step: float) -> float:
        lanes = 32 * lane_count(kept.coefficients.numel())
        stored = 8 * (kept.basis.nbytes + kept.scale.nbytes + kept.ranks.nbytes)
        return self.quantiser.bits(kept.coefficients, kept.scale.float(), step) + lanes + stored

    def decode(self, payload: Payload) -> tuple[list[Tensor], list[Tensor]]:
        """See ``BlockCodec``."""
        out = []
        for side in ("key", "value"):
            part = {name.split(".", 1)[1]: t for name, t in payload.tensors.items() if name.startswith(f"{side}.")}
            ranks, width = part["ranks"].tolist(), part["mean"].shape[1]
            scale, step = part["magnitude"].float(), float(payload.tensors["step"])
            coefficients = self.quantiser.decode(part["coded"], part["escaped"], scale, step, payload.tokens)
            dense = part["codes"].float() * part["scale"].float()[:, None]
            bases = iter(dense.split([rank for rank in ranks if rank != NATIVE], 0))
            split = coefficients.split([width if rank == NATIVE else rank for rank in ranks], 1)
            units = [own if rank == NATIVE else own @ next(bases) for own, rank in zip(split, ranks)]
            rows = torch.cat([u * g.float() + m.float() for u, g, m in zip(units, part["gain"], part["mean"])], 1)
            out.append(layers_of(rows, payload.tensors["heads"].tolist(), width))
        return out[0], out[1]


def _stored_step(step: float) -> float:
    """The step as its four bytes hold it."""
    return float(torch.tensor(step, dtype=torch.float32))


@dataclass(frozen=True)
class _Kept:
    """What of a side is coded at a step: basis vectors, coefficients (tokens, components), their scales, ranks of units."""

    basis: StoredBasis
    coefficients: Tensor
    scale: Tensor
    ranks: Tensor


@dataclass(frozen=True)
class _Side:
    """One side of a block, unit by unit: normalised states (units, tokens, width) and their principal axes."""

    mean: Tensor
    gain: Tensor
    centred: Tensor
    vectors: Tensor
    scale: Tensor
    power: Tensor
    native_power: Tensor

    @staticmethod
    def of(states: list[Tensor]) -> _Side:
        rows = rows_of([s.float().cpu() for s in states]).unflatten(1, (-1, states[0].shape[-1]))
        mean = rows.mean(0).half()
        centred = (rows - mean.float()).transpose(0, 1)
        gain = centred.square().mean((1, 2)).sqrt().clamp_min(_LEAST_GAIN).half()
        centred = centred / gain.float()[:, None, None]
        vectors = torch.stack([principal_axes(unit.T @ unit / len(unit)) for unit in centred])
        turned = torch.einsum("utc,urc->utr", centred, vectors)
        power, native = turned.square().mean(1).double(), centred.square().mean(1).double()
        return _Side(mean, gain, centred, vectors, turned.abs().amax(1), power, native)

    def kept(self, step: float) -> _Kept:
        """Per unit the cheaper of its own channels and a principal basis, in bits and in squared error at the exchange rate of
        a uniform quantiser with this step; of a basis only the vectors that are worth their own bytes."""
        tokens, width = self.centred.shape[1:]
        price = 6 / (math.log(2) * step**2)  # -d bits / d error of a coefficient coded with error step^2 / 12
        native = _lagrangian(self.native_power, step, price, tokens).sum(1)
        coded = _lagrangian(self.power, step, price, tokens) + 8 * (width + 4)
        dropped = price * tokens * self.power
        worth = coded < dropped
        principal = torch.where(worth, coded, dropped).sum(1)
        stays = native <= principal
        worth[stays] = False
        ranks = torch.where(stays, NATIVE, worth.sum(1))
        basis = StoredBasis.store(self.vectors[worth].view(-1, width), 0.0)
        bases = iter(basis.dense().split(ranks[~stays].tolist(), 0))
        parts = [unit if keep else unit @ torch.linalg.pinv(next(bases)) for unit, keep in zip(self.centred, stays.tolist())]
        coefficients = torch.cat(parts, 1)
        scale = coefficients.abs().mean(0).clamp_min(step / 16).half()
        return _Kept(basis, coefficients, scale, ranks.to(torch.int16))


def _lagrangian(power: Tensor, step: float, price: float, tokens: int) -> Tensor:
    """Expected bits plus priced error of coefficients of mean square ``power`` over all tokens."""
    bits = (0.5 * (power / step**2).clamp_min(1e-12).log2() + _GAUSSIAN).clamp_min(0.0)
    return tokens * (bits + price * power.clamp_max(step**2 / 12)) + _SCALE_BITS
