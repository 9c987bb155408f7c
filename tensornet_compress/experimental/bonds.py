"""Thresholding the bonds of trains and trees: one multiplier for the bonds of many networks, in canonical form.

In canonical form the singular values of a bond are those of the unfolding that the bond cuts, so that dropping one costs its
square; what it saves are the slices of the two cores that share the bond. Bonds are not independent (the bytes of a slice fall
as neighbouring bonds shrink), so thresholds are applied again until ranks no longer change.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from tensornet_compress.bisection import bracket, least_kept
from tensornet_compress.coding import FloatFormat, format_nbytes
from tensornet_compress.decompose import round_cores
from tensornet_compress.errors import BudgetError, TensorNetError
from tensornet_compress.tensor import NetworkSpec, TensorNetwork, TermSpec

_ROUNDS = 50
_BISECTIONS = 120
_LARGEST = 1e60


def threshold_bonds(network: TensorNetwork, multiplier: float, step: float = 1.0) -> TensorNetwork:
    """Drop every singular value of every bond up to ``sqrt(2 a lambda unit)``, ``unit`` being the bytes that it occupies.

    Args:
        network: one term with floating-point cores. The metric is Euclidean: scale the cores' legs beforehand for a diagonal
            one.
        multiplier, step: lambda, in squared norm per byte, and the step a.

    Ranks never grow, every bond keeps rank one at least, and applying it twice changes nothing.

    >>> import torch, tensornet_compress as tnc
    >>> network = tnc.to_network(torch.diag(torch.tensor([8.0, 4.0, 2.0, 1.0])), ranks=4)
    >>> tnc.train.threshold_bonds(network, multiplier=0.1).spec.terms[0].ranks
    (2,)
    """
    term = _only_term(network)
    cores = network.cores(dtype=torch.float64)
    for _ in range(_ROUNDS):
        _, ranks, spectra = round_cores(cores, term.topology)
        kept = _kept(term, ranks, spectra, 2 * step * multiplier)
        cores, new_ranks, _ = round_cores(cores, term.topology, max_ranks=kept)
        if new_ranks == ranks:
            break
    term = term.model_copy(update={"ranks": tuple(new_ranks)})
    spec = NetworkSpec(shape=network.spec.shape, dtype=network.spec.dtype, terms=(term,))
    return TensorNetwork.from_cores(spec, [cores])


def _kept(term: TermSpec, ranks: Sequence[int], spectra: Sequence[Tensor], price: float) -> list[int]:
    """The rank that each bond keeps at the present size of the others."""
    return [
        max(1, int((spectrum[: ranks[bond]].double().square() > price * unit_nbytes(term, ranks, bond)).sum()))
        for bond, spectrum in enumerate(spectra)
    ]


def unit_nbytes(term: TermSpec, ranks: Sequence[int], bond: int) -> int:
    """Bytes of the slices of both cores at one index of a bond."""
    sizes = {f"p{position}": size for position, size in enumerate(term.layout.dims)}
    sizes |= {f"b{number}": rank for number, rank in enumerate(ranks)}
    total = 0
    for core in term.topology.edges[bond]:
        labels = [label for label in term.topology.core_labels(core) if label != f"b{bond}"]
        total += format_nbytes(term.formats[core], (prod(sizes[label] for label in labels),))
    return total


def shrink_bonds(networks: Sequence[TensorNetwork], nbytes: int, weights: Sequence[float] | None = None) -> list[TensorNetwork]:
    """Threshold the bonds of all networks with the least multiplier under which they take at most ``nbytes`` together.

    ``weights``: what a unit of squared error of each network counts, for instance its sensitivity.

    >>> import torch, tensornet_compress as tnc
    >>> networks = [tnc.to_network(torch.randn(16, 16), ranks=8) for _ in range(2)]
    >>> sum(network.nbytes for network in tnc.train.shrink_bonds(networks, nbytes=800)) <= 800
    True

    Raises:
        BudgetError: rank one everywhere is too large.
        TensorNetError: a sum of networks, integer cores, or weights that are not positive.
    """
    scales = list(weights) if weights is not None else [1.0] * len(networks)
    if len(scales) != len(networks) or not all(scale > 0 for scale in scales):
        raise TensorNetError(f"give one positive weight per network, were given {scales} for {len(networks)}")

    def at(multiplier: float) -> list[TensorNetwork]:
        return [threshold_bonds(network, multiplier / scale) for network, scale in zip(networks, scales)]

    def size(multiplier: float) -> int:
        return sum(network.nbytes for network in at(multiplier))

    def fits(multiplier: float) -> bool:
        return size(multiplier) <= nbytes

    if fits(0.0):
        return at(0.0)
    try:
        low, high = bracket(fits)
    except ValueError:
        raise BudgetError(f"{nbytes:,} bytes are too few: rank one everywhere takes {size(_LARGEST):,}") from None
    return at(least_kept(fits, low, high, steps=_BISECTIONS, ratio=1 + 1e-9))


def _only_term(network: TensorNetwork) -> TermSpec:
    terms = network.spec.terms
    if len(terms) != 1 or not all(isinstance(fmt, FloatFormat) for fmt in terms[0].formats):
        raise TensorNetError(
            f"bonds of one network with floating-point cores are thresholded, was given {network.spec.describe()}"
        )
    return terms[0]
