"""One proximal step in a metric: a gradient step, then a threshold on the spectra of many layers with one multiplier.

A layer at rank r costs ``min(unit * r, dense)`` bytes. In its metric, with step a and multiplier lambda, the hard threshold
is the exact minimiser of ``1/(2 a) |V - W|^2 + lambda * bytes``: singular values up to ``sqrt(2 a lambda unit)`` are dropped,
or the layer stays dense where that is worth its bytes. The soft threshold takes ``a lambda unit`` off each singular value
(the nuclear norm in place of the rank).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tensornet_compress.bisection import bracket, least_kept
from tensornet_compress.decompose import MatrixSpectrum, matrix_spectrum
from tensornet_compress.errors import BudgetError
from tensornet_compress.metric import KroneckerMetric

Threshold = Literal["hard", "soft"]
Matrices = Mapping[str, Tensor]


@dataclass(frozen=True)
class Cost:
    """Bytes of a layer: ``unit`` per unit of rank, ``dense`` when it is not factorised."""

    unit: int
    dense: int

    def nbytes(self, rank: int | None) -> int:
        """Bytes at a rank; None means dense."""
        return self.dense if rank is None else self.unit * rank


@dataclass(frozen=True)
class Choice:
    """The multiplier, each layer's rank (None: dense), and bytes in all. ``factored``: no layer was allowed to stay dense, and
    a dense matrix is priced as one of full rank."""

    multiplier: float
    ranks: dict[str, int | None]
    nbytes: int
    factored: bool = False


def choose_ranks(
    spectra: Mapping[str, MatrixSpectrum],
    costs: Mapping[str, Cost],
    multiplier: float,
    step: float,
    threshold: Threshold,
    factored: bool = False,
) -> Choice:
    """Ranks under a multiplier (nats per byte); every layer keeps at least rank one."""
    ranks = {
        name: _rank(spectrum.squares, costs[name], multiplier, step, threshold, factored) for name, spectrum in spectra.items()
    }
    return Choice(multiplier, ranks, sum(costs[name].nbytes(rank) for name, rank in ranks.items()), factored)


def _rank(squares: Tensor, cost: Cost, multiplier: float, step: float, threshold: Threshold, factored: bool) -> int | None:
    if threshold == "soft":
        rank = max(1, int((squares.sqrt() > step * multiplier * cost.unit).sum()))
        return rank if factored or cost.nbytes(rank) < cost.dense else None
    price = 2 * step * multiplier
    rank = max(1, int((squares > price * cost.unit).sum()))
    if factored:
        return rank
    paid = float(squares[rank:].sum()) + price * cost.nbytes(rank)
    return rank if paid < price * cost.dense else None


def meet_budget(
    spectra: Mapping[str, MatrixSpectrum], costs: Mapping[str, Cost], allowed: int, step: float, threshold: Threshold = "hard"
) -> Choice:
    """The least multiplier, to double precision, under which the layers take at most ``allowed`` bytes.

    A layer that may stay dense jumps from dense to a low rank as the multiplier grows, which can leave bytes unused where few
    layers share them. So the budget is also met with every layer factored, and the choice that drops less is taken.

    Raises:
        BudgetError: rank one everywhere is too large.
    """
    mixed = _bisected(spectra, costs, allowed, step, threshold, factored=False)
    if threshold == "soft" or mixed.multiplier == 0:
        return mixed
    if sum(cost.unit for cost in costs.values()) > allowed:
        return mixed
    factored = _bisected(spectra, costs, allowed, step, threshold, factored=True)
    return min(mixed, factored, key=lambda choice: _dropped(spectra, choice))


def _dropped(spectra: Mapping[str, MatrixSpectrum], choice: Choice) -> float:
    return sum(spectra[name].error(rank) for name, rank in choice.ranks.items() if rank is not None)


def _bisected(
    spectra: Mapping[str, MatrixSpectrum],
    costs: Mapping[str, Cost],
    allowed: int,
    step: float,
    threshold: Threshold,
    factored: bool,
) -> Choice:
    def at(multiplier: float) -> Choice:
        return choose_ranks(spectra, costs, multiplier, step, threshold, factored)

    def fits(multiplier: float) -> bool:
        return at(multiplier).nbytes <= allowed

    if fits(0.0):
        return at(0.0)
    try:
        return at(least_kept(fits, *bracket(fits)))
    except ValueError:
        smallest = sum(min(cost.unit, cost.dense) for cost in costs.values())
        raise BudgetError(
            f"the budget leaves {allowed:,} bytes for the targeted layers, rank one everywhere takes {smallest:,}; raise it"
        ) from None


def apply_threshold(
    spectra: Mapping[str, MatrixSpectrum], costs: Mapping[str, Cost], choice: Choice, step: float, threshold: Threshold
) -> dict[str, Tensor]:
    """Matrices after thresholding; layers that stay dense keep their values (hard) or are shrunk too (soft)."""
    results = {}
    for name, spectrum in spectra.items():
        rank = choice.ranks[name]
        factors = torch.ones_like(spectrum.squares)
        if threshold == "soft":
            limit = step * choice.multiplier * costs[name].unit
            factors = (1 - limit / spectrum.squares.sqrt().clamp_min(1e-300)).clamp_min(0)
        if rank is None and threshold == "hard":
            results[name] = spectrum.matrix
            continue
        if rank is not None:
            factors[rank:] = 0
        results[name] = spectrum.shrunk(factors)
    return results


def proximal_step(
    weights: Matrices,
    gradients: Matrices | None,
    metrics: Mapping[str, KroneckerMetric],
    costs: Mapping[str, Cost],
    allowed: int,
    step: float,
    threshold: Threshold = "hard",
    price_share: float = 1.0,
) -> tuple[Choice, dict[str, Tensor]]:
    """A gradient step in the metric and a threshold with the multiplier that meets ``allowed`` bytes (times ``price_share``).

    From a stationary point with ``step`` 1 it is the closed-form truncation in the metric: KFAC-SVD, or SVD-LLM when only
    inputs are weighted; ``gradients`` None stands for gradients that are zero.

    >>> import torch, tensornet_compress as tnc
    >>> from tensornet_compress.metric import KroneckerMetric
    >>> from tensornet_compress.train.proximal import Cost
    >>> weights, costs = {"w": torch.randn(8, 12)}, {"w": Cost(unit=4 * 20, dense=4 * 96)}
    >>> choice, reduced = tnc.train.proximal_step(weights, None, {"w": KroneckerMetric()}, costs, allowed=240, step=1.0)
    >>> choice.ranks, int(torch.linalg.matrix_rank(reduced["w"]))
    ({'w': 3}, 3)
    """
    moved = weights if gradients is None else gradient_step(weights, gradients, metrics, step)
    spectra = {name: matrix_spectrum(matrix, metrics[name]) for name, matrix in moved.items()}
    choice = meet_budget(spectra, costs, allowed, step, threshold)
    if price_share < 1:
        choice = choose_ranks(spectra, costs, price_share * choice.multiplier, step, threshold, choice.factored)
    return choice, apply_threshold(spectra, costs, choice, step, threshold)


def gradient_step(
    weights: Matrices, gradients: Matrices, metrics: Mapping[str, KroneckerMetric], step: float
) -> dict[str, Tensor]:
    """``W - a M^-1 G`` for each matrix (m, n)."""
    return {
        name: (weight.double() - step * metrics[name].precondition(gradients[name].double())).to(weight.dtype)
        for name, weight in weights.items()
    }


def model_change(
    weights: Matrices, proposal: Matrices, gradients: Matrices, metrics: Mapping[str, KroneckerMetric], step: float
) -> float:
    """``<G, D> + |D|_M^2 / (2 a)`` of a change D: what the loss changes by at most when a < 1/L."""
    total = 0.0
    for name, weight in weights.items():
        change = proposal[name].double() - weight.double()
        total += float((gradients[name].double() * change).sum()) + metrics[name].norm2(change) / (2 * step)
    return total
