"""KVTC-style (2511.01815): a calibrated Euclidean principal basis, bits by water-filling; per layer, or all layers joined."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from tensornet_compress.bench.cache_case import CACHE_METHODS, CacheCase, CacheMethod, States
from tensornet_compress.bench.side import Unavailable
from tensornet_compress.coding.fixed_rate import Curve
from tensornet_compress.kv.profile.tree import layers_of, rows_of


class Pca:
    """KVTC-like (2511.01815): a Euclidean principal basis of plain keys and values over ``span`` channels (one layer, or all),
    integer bits by reverse water-filling, a uniform quantiser with calibrated steps."""

    def __init__(
        self,
        label: str,
        moments: dict[str, tuple[Tensor, Tensor]],
        span: dict[str, int],
        bits: float,
        curve: Curve,
        rows: dict[str, Tensor] | None = None,
    ):
        """``moments``: side -> (mean, covariance) over all layers; ``rows``: side -> calibration rows, of which fewer than
        channels give the joined basis faster than the covariance does, and the same."""
        self.label, self.bits = label, bits
        self.mean = {side: mean for side, (mean, _) in moments.items()}
        self.bases = {
            side: principal_of_rows(rows[side])
            if rows is not None and len(rows[side]) < span[side] == len(mean)
            else principal(covariance, span[side])
            for side, (mean, covariance) in moments.items()
        }
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
    def profile_nbytes(self) -> int:
        """Kept basis vectors in 16 bits; means and steps of all channels in 32."""
        total = 0
        for side, bases in self.bases.items():
            kept = self.chosen[side].split([len(deviation) for _, deviation in bases])
            total += sum(2 * len(basis) * int((part > 0).sum()) for (basis, _), part in zip(bases, kept))
            total += 8 * len(self.mean[side])
        return total

    @property
    def layer_bits(self) -> list[tuple[float, float]] | None:
        """Bits of keys and values of each layer; ``None`` for a joined basis, whose components belong to no layer."""
        if any(len(bases) == 1 for bases in self.bases.values()):
            return None
        means = [
            [float(part.double().mean()) for part in self.chosen[side].split([len(d) for _, d in self.bases[side]])]
            for side in ("key", "value")
        ]
        return list(zip(*means))

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
            count = sum(b.shape[1] for b, _ in self.bases[side])
            chosen, deviation = self.chosen[side][:count], self.deviation[side][:count]
            coefficients = torch.cat([part @ b for part, (b, _) in zip(spans, self.bases[side])], 1)
            step = (self.curve.step[chosen] * deviation).clamp_min(1e-12)
            half = (1 << chosen) / 2
            codes = (coefficients / step).floor().clamp(-half, half - 1) + 0.5
            decoded = torch.where(chosen > 0, codes * step, 0.0)
            parts = decoded.split([b.shape[1] for b, _ in self.bases[side]], 1)
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


def principal_of_rows(rows: Tensor) -> list[tuple[Tensor, Tensor]]:
    """The same from fewer rows (count, channels) than channels: the basis has ``count`` columns, the deviations of the
    directions that no row has are zero."""
    key = (rows.data_ptr(), 0)
    if key not in _principal_cache:
        centred = rows.float() - rows.float().mean(0)
        values, vectors = torch.linalg.eigh(centred @ centred.T)
        basis = centred.T @ vectors / values.clamp_min(1e-6 * float(values[-1])).sqrt()
        deviation = torch.zeros(rows.shape[1])
        deviation[: len(rows)] = (values.clamp_min(0) / len(rows)).sqrt()
        _principal_cache[key] = [(basis, deviation)]
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


def kvtc(joined: bool, case: CacheCase, bits: float) -> Pca:
    """A basis over all layers, or one for each. Vectors of kept components and their steps count as profile bytes."""
    if not joined and len(set(case.heads)) > 1:
        raise Unavailable(f"layers have {sorted(set(case.heads))} key-value heads; one basis a layer needs the same in all")
    span = dict.fromkeys(("key", "value"), case.channels if joined else case.width * case.heads[0])
    label = "kvtc-joined" if joined else "kvtc-layer"
    return Pca(label, case.calibration_moments, span, bits, case.profile.curve, case.calibration_rows)


CACHE_METHODS.add(CacheMethod("kvtc-joined", partial(kvtc, True), explanation="KVTC-style, one basis over all layers"))
CACHE_METHODS.add(CacheMethod("kvtc-layer", partial(kvtc, False), explanation="KVTC-style, one basis for each layer"))
