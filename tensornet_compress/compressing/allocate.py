"""One multiplier for everything: of all forms that layers may take those of least ``nats + multiplier * bytes``.

Entropy-coded integers fill the budget smoothly. A further bit saves ``step^2 ln 2 / 12`` nats there, whatever the layer, which
is the multiplier that ranks of two cores and networks in stepped formats are held to.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import log, log2

import numpy as np
import torch
from scipy.interpolate import PchipInterpolator

from tensornet_compress.bisection import bracket, least_kept
from tensornet_compress.compressing.jobs import SIDE_BITS, Offer, Surveyed
from tensornet_compress.decompose.one_step import SLOPE
from tensornet_compress.errors import BudgetError
from tensornet_compress.tensor import NetworkSpec

# Predicted gains below this share are not worth giving up one dense core for.
_WORTH_A_NETWORK = 0.95


def byte_price(step: float) -> float:
    """What a byte is worth in nats where integers are coded at this step."""
    return 8 * step**2 * log(2) / 12


@dataclass(frozen=True)
class Pick:
    """A form of a layer: predicted bytes and nats. Without a ``spec`` it is entropy-coded integers at the step of the moment,
    as one core or as two of a ``rank``."""

    family: str
    nbytes: float
    nats: float
    spec: NetworkSpec | None = None
    rank: int | None = None


class Market:
    """All layers of a model with their forms at any step."""

    def __init__(self, layers: Sequence[Surveyed], offer: Offer):
        self.layers, self.offer = layers, offer
        octaves = np.log2(offer.steps)
        rates = np.array([[(bits / 8, log(max(layer.price * e, 1e-300))) for bits, e in layer.coded] for layer in layers])
        self._foretold = PchipInterpolator(octaves, rates, axis=1)
        self.finest, self.coarsest = offer.steps[0], offer.steps[-1]

    def at(self, step: float) -> list[Pick]:
        """The best form of every layer."""
        price = byte_price(step)
        picks = []
        for layer, (nbytes, log_nats) in zip(self.layers, self._foretold(log2(step))):
            best = Pick("dense", float(nbytes), float(np.exp(log_nats)))
            cost = _WORTH_A_NETWORK * (best.nats + price * best.nbytes)
            others = [Pick(o.family, o.nbytes, layer.price * o.error, spec=o.spec) for o in layer.options]
            for other in [*others, *_two_cores(layer, step)]:
                if other.nats + price * other.nbytes < cost:
                    best, cost = other, other.nats + price * other.nbytes
            picks.append(best)
        return picks

    def step_for(self, allowed: float) -> float:
        """The finest step at which all layers together take at most ``allowed`` bytes, as foretold."""

        def fits(step: float) -> bool:
            return sum(pick.nbytes for pick in self.at(step)) <= allowed

        if not fits(self.coarsest):
            least = int(sum(pick.nbytes for pick in self.at(self.coarsest)))
            raise BudgetError(
                f"the budget leaves {int(allowed):,} bytes for the targeted layers, which take {least:,} at the coarsest step; "
                "raise the budget, or target more layers"
            )
        return least_kept(fits, self.finest, self.coarsest, ratio=1.0005)


def _two_cores(layer: Surveyed, step: float) -> list[Pick]:
    """Two entropy-coded cores, as far as their spectrum foretells them.

    A number of the left core has variance ``s / rows`` in the metric for a component of squared singular value s, one of the
    right core ``s / columns``. A component is kept while it loses more than its numbers cost.
    """
    if layer.squares is None:
        return []
    rows, columns = layer.shape[0], int(np.prod(layer.shape[1:]))
    unit = step**2 / (2 * layer.price)
    dropped = layer.squares.double() / unit
    bits = rows * _gaussian_bits(dropped / rows) + columns * _gaussian_bits(dropped / columns)
    cost = (rows + columns) / 12 + SLOPE * bits
    rank = int((cost < dropped).sum())
    if not rank:
        return []
    nats = layer.price * unit * (float(dropped[rank:].sum()) + rank * (rows + columns) / 12)
    side = 2 * rank + rows + columns + 2 * SIDE_BITS / 8
    return [Pick("svd", float(bits[:rank].sum()) / 8 + side, nats, rank=rank)]


def _gaussian_bits(variance: torch.Tensor) -> torch.Tensor:
    """Bits of a normal number of a variance in squared steps, rounded and entropy-coded: its differential entropy at high
    rates, nothing at low ones."""
    return 0.5 * torch.log2(1 + 2 * torch.pi * torch.e * variance)


def choose_options(nbytes: Sequence[Sequence[int]], nats: Sequence[Sequence[float]], max_bytes: int) -> list[int]:
    """Index of the chosen option of each layer: all at one multiplier, the least that stays within ``max_bytes``, then upgrades
    with what is left, those that save most nats for a byte first.

    Raises:
        BudgetError: even the smallest options are too large together.
    """
    smallest = sum(min(sizes) for sizes in nbytes)
    if smallest > max_bytes:
        raise BudgetError(
            f"the budget leaves {max_bytes:,} bytes for the targeted layers, their smallest options take {smallest:,}; "
            "raise the budget, or target more layers"
        )
    sizes, values = [np.array(s, float) for s in nbytes], [np.array(v, float) for v in nats]

    def picks(price: float) -> list[int]:
        return [int(np.lexsort((size, value + price * size))[0]) for size, value in zip(sizes, values)]

    def fits(price: float) -> bool:
        return sum(size[pick] for size, pick in zip(sizes, picks(price))) <= max_bytes

    try:
        low, high = bracket(fits)
        chosen = picks(least_kept(fits, low, high))
    except ValueError:
        chosen = [int(np.lexsort((value, size))[0]) for size, value in zip(sizes, values)]
    left = max_bytes - sum(size[pick] for size, pick in zip(nbytes, chosen))
    while True:
        best: tuple[float, int, int] | None = None
        for layer, (size, value, pick) in enumerate(zip(sizes, values, chosen)):
            more, gain = size - size[pick], value[pick] - value
            worth = np.where((more <= left) & (gain > 0), gain / np.maximum(more, 1e-9), 0.0)
            option = int(worth.argmax())
            if worth[option] > 0 and (best is None or worth[option] > best[0]):
                best = float(worth[option]), layer, option
        if best is None:
            return chosen
        _, layer, option = best
        left -= nbytes[layer][option] - nbytes[layer][chosen[layer]]
        chosen[layer] = option


def uniform_options(nbytes: Sequence[Sequence[int]], nats: Sequence[Sequence[float]], shares: Sequence[float]) -> list[int]:
    """The least damaging option of each layer within that layer's own share of the bytes (the baseline allocator).

    Raises:
        BudgetError: a layer has no option within its share.
    """
    chosen = []
    for layer, (sizes, values, share) in enumerate(zip(nbytes, nats, shares)):
        fitting = [option for option, size in enumerate(sizes) if size <= share]
        if not fitting:
            raise BudgetError(f"layer {layer} may take {share:,.0f} bytes, its smallest option takes {min(sizes):,}")
        chosen.append(min(fitting, key=lambda option: values[option]))
    return chosen
