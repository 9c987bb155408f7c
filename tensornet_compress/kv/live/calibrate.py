"""Bases of live mode from the same moments as the tree: keys are averaged over rotary positions, because theirs stay on."""

from __future__ import annotations

import torch
from torch import Tensor

from tensornet_compress.kv.live.codec import Curve, LiveBasis, live_basis
from tensornet_compress.kv.rope import Rotary

_POSITIONS = torch.arange(0, 4096, 32)
_CURVE_VALUES = 200_000


def live_bases(covariance: Tensor, mean: Tensor, metric: Tensor, heads: list[int], rotary: Rotary | None) -> list[LiveBasis]:
    """One basis per layer of one side.

    Args:
        covariance: plain states of all units, (n, n); mean: (n,); metric: (units, width, width); heads: of every layer.
        rotary: given for keys: second moments and metric are then averaged over positions, and the mean is no longer constant.
    """
    width = metric.shape[-1]
    turns = None if rotary is None else rotary.rotate(torch.eye(width).expand(len(_POSITIONS), -1, -1), _POSITIONS[:, None]).mT
    bases, unit = [], 0
    for count in heads:
        own = slice(unit * width, (unit + count) * width)
        second, centre, blocks = covariance[own, own].double(), mean[own].double(), metric[unit : unit + count].double()
        if turns is not None:
            second = second + torch.outer(centre, centre)
            grid = second.view(count, width, count, width).permute(0, 2, 1, 3)
            second = _average(grid, turns).permute(0, 2, 1, 3).reshape(count * width, -1)
            blocks, centre = _average(blocks, turns), torch.zeros_like(centre)
        bases.append(live_basis(second, centre, blocks))
        unit += count
    return bases


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
    everything = torch.cat(samples)
    return Curve.measure(everything[:: max(1, len(everything) // _CURVE_VALUES)])


def _average(matrices: Tensor, turns: Tensor) -> Tensor:
    """Mean of R M R' over turns (positions, width, width), for matrices (..., width, width)."""
    turned = torch.zeros_like(matrices)
    for turn in turns.double():
        turned += turn @ matrices @ turn.T
    return turned / len(turns)
