"""KVTC-style caches (2511.01815): a calibrated Euclidean principal basis of plain keys and values, over all layers or for each,
integer bits by reverse water-filling, and a uniform quantiser with calibrated steps."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from tensornet_compress.bench.cache_case import CACHE_METHODS, CacheCase, CacheCoder, States
from tensornet_compress.bench.peer_packages import Unavailable
from tensornet_compress.bench.registry import Method
from tensornet_compress.coding.fixed_rate import Curve
from tensornet_compress.kv.profile.profile import SIDES
from tensornet_compress.kv.profile.tree import layers_of, rows_of

Basis = tuple[Tensor, Tensor]
"""Of a span of channels: the vectors as columns, and the deviation of each coefficient."""


def kvtc(joined: bool, case: CacheCase, bits: float) -> CacheCoder:
    """A basis over all layers, or one for each. Vectors of kept components in 16 bits, and means and steps of all channels in
    32, count as profile bytes."""
    if not joined and len(set(case.heads)) > 1:
        raise Unavailable(f"layers have {sorted(set(case.heads))} key-value heads; one basis a layer needs the same in all")
    if ("kvtc", joined) not in case.memo:
        case.memo["kvtc", joined] = _bases(case, joined)
    bases: dict[str, list[Basis]] = case.memo["kvtc", joined]
    means = {side: mean for side, (mean, _) in case.calibration_moments.items()}
    chosen = _rates(bases, case.profile.curve, bits)
    spent = float(torch.cat([part for side in SIDES for part in chosen[side]]).double().mean())

    def recode(keys: States, values: States, positions: Tensor) -> tuple[States, States, float]:
        decoded = []
        for side, states in zip(SIDES, (keys, values)):
            spans = (rows_of(states) - means[side]).split([len(vectors) for vectors, _ in bases[side]], 1)
            parts = [_coded(*given, case.profile.curve) for given in zip(spans, bases[side], chosen[side])]
            rows = torch.cat(parts, 1) + means[side]
            decoded.append(layers_of(rows, [len(layer) for layer in states], states[0].shape[-1]))
        return decoded[0], decoded[1], spent

    kept = sum(
        2 * len(vectors) * int((rates > 0).sum()) for side in SIDES for (vectors, _), rates in zip(bases[side], chosen[side])
    )
    label = "kvtc-joined" if joined else "kvtc-layer"
    by_layer = [] if joined else list(zip(*([float(rates.double().mean()) for rates in chosen[side]] for side in SIDES)))
    return CacheCoder(f"{label} {bits:g} b", recode, kept + sum(8 * len(mean) for mean in means.values()), by_layer)


def _bases(case: CacheCase, joined: bool) -> dict[str, list[Basis]]:
    """The bases of every side. Fewer calibration rows than channels give the joined one faster than the covariance does."""
    rows, span = case.calibration_rows, case.channels if joined else case.width * case.heads[0]
    if joined and rows is not None:
        return {side: [_principal_of_rows(rows[side])] for side in SIDES}
    return {side: _principal(case.calibration_moments[side][1], span) for side in SIDES}


def _principal(covariance: Tensor, span: int) -> list[Basis]:
    """Span by span of channels."""
    bases = []
    for start in range(0, len(covariance), span):
        values, vectors = torch.linalg.eigh(covariance[start : start + span, start : start + span])
        bases.append((vectors, values.clamp_min(1e-12).sqrt()))
    return bases


def _principal_of_rows(rows: Tensor) -> Basis:
    """The same from fewer rows (count, channels) than channels: the basis has ``count`` columns, the deviations of the
    directions that no row has are zero."""
    centred = rows.float() - rows.float().mean(0)
    values, vectors = torch.linalg.eigh(centred @ centred.T)
    basis = centred.T @ vectors / values.clamp_min(1e-6 * float(values[-1])).sqrt()
    deviation = torch.zeros(rows.shape[1])
    deviation[: len(rows)] = (values.clamp_min(0) / len(rows)).sqrt()
    return basis, deviation


def _rates(bases: dict[str, list[Basis]], curve: Curve, bits: float) -> dict[str, list[Tensor]]:
    """Bits of every component: of joined bases shared among both sides. Layer by layer every basis gets the same rate:
    Euclidean errors of different layers do not compare."""
    deviations = {side: [deviation for _, deviation in bases[side]] for side in SIDES}
    if any(len(parts) > 1 for parts in deviations.values()):
        return {side: [waterfill(part, curve, bits) for part in parts] for side, parts in deviations.items()}
    both = [deviations[side][0] for side in SIDES]
    shared = waterfill(torch.cat(both), curve, bits).split([len(deviation) for deviation in both])
    return {side: [rates] for side, rates in zip(SIDES, shared)}


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


def _coded(rows: Tensor, basis: Basis, rates: Tensor, curve: Curve) -> Tensor:
    """Rows (tokens, channels) of a span, rounded in its basis and decoded."""
    vectors, deviation = basis
    count = vectors.shape[1]
    rates, deviation = rates[:count], deviation[:count]
    step = (curve.step[rates] * deviation).clamp_min(1e-12)
    half = (1 << rates) / 2
    codes = (rows @ vectors / step).floor().clamp(-half, half - 1) + 0.5
    return torch.where(rates > 0, codes * step, 0.0) @ vectors.T


CACHE_METHODS.add(Method("kvtc-joined", partial(kvtc, True), "KVTC-style, one basis over all layers"))
CACHE_METHODS.add(Method("kvtc-layer", partial(kvtc, False), "KVTC-style, one basis for each layer"))
