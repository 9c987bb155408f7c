"""The front door of the room: a tensor, a layout and a topology -> a network, by ranks, by tolerance or by bytes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tensornet_compress.coding import FloatFormat, NumberFormat
from tensornet_compress.decompose.linalg import require_finite, working_dtype
from tensornet_compress.decompose.ranks import bond_spectra, feasible_ranks, ranks_for_bytes, ranks_for_error, tails
from tensornet_compress.decompose.realise import realise
from tensornet_compress.errors import TensorNetError
from tensornet_compress.metric import KroneckerMetric
from tensornet_compress.tensor import Layout, NetworkSpec, TensorNetwork, TermSpec, Topology

# Many squares of such numbers add up to less than the largest of single precision, in which cores are kept.
_LARGEST = 1e16


def to_network(
    tensor: Tensor,
    topology: Topology | None = None,
    layout: Layout | None = None,
    *,
    ranks: int | Sequence[int] | None = None,
    max_error: float | None = None,
    max_bytes: int | None = None,
    fmt: NumberFormat | None = None,
    metric: KroneckerMetric | None = None,
    sweeps: int = 1,
) -> TensorNetwork:
    """Decompose ``tensor`` over a topology (a tensor train over its axes by default).

    Give exactly one of ``ranks`` (an int caps every bond; too high ranks are lowered), ``max_error`` (relative Frobenius error
    of the truncation, guaranteed in the Euclidean metric before rounding to ``fmt``) and ``max_bytes`` (stored bytes). ``fmt``
    is fp32 by default.

    >>> import torch
    >>> import tensornet_compress as tnc
    >>> grid = torch.linspace(0, 1, 16)
    >>> wave = torch.sin(grid[:, None, None] + grid[:, None] + grid)
    >>> network = tnc.to_network(wave, max_error=1e-3)
    >>> network.spec.describe(), network.nbytes
    ('16|16|16 r=2,2 fp32', 512)

    Raises:
        TensorNetError: not exactly one limit, an impossible limit, or a tensor that is empty, not dense, not of floating point
            numbers, not finite, or of numbers beyond 1e16 (1e32 in float64).
    """
    limits = {"ranks": ranks, "max_error": max_error, "max_bytes": max_bytes}
    given = [name for name, value in limits.items() if value is not None]
    if len(given) != 1:
        raise TensorNetError(f"give exactly one of ranks, max_error and max_bytes; was given {given or 'none'}")
    require_finite(tensor, "tensor")
    tensor = tensor.detach()
    largest = float(tensor.abs().max())
    if largest > (_LARGEST if working_dtype(tensor.dtype) == torch.float32 else _LARGEST**2):
        raise TensorNetError(
            f"the tensor holds numbers up to {largest:.3g}, beyond what cores can hold; divide it by a power of two"
        )
    layout = layout or Layout.native(tuple(tensor.shape))
    topology = topology or Topology.train(len(layout.dims))
    if topology.positions != len(layout.dims):
        raise TensorNetError(
            f"a topology of {topology.positions} legs does not fit a layout of {len(layout.dims)} modes {layout.dims}"
        )
    fmt = fmt or FloatFormat(dtype="fp32")
    laid_out = layout.apply(tensor.to(working_dtype(tensor.dtype)))
    if ranks is not None:
        wanted = [ranks] * len(topology.edges) if isinstance(ranks, int) else list(ranks)
        if len(wanted) != len(topology.edges) or (wanted and min(wanted) < 1):
            raise TensorNetError(f"ranks {wanted} do not fit {len(topology.edges)} bonds; give one rank of at least 1 for each")
    else:
        spectra = bond_spectra(laid_out, topology)
        if max_error is not None:
            if not max_error >= 0:
                raise TensorNetError(f"max_error must not be negative, was given {max_error}")
            wanted = _ranks_within(spectra, (max_error * float(laid_out.double().norm())) ** 2, layout, topology)
        else:
            assert max_bytes is not None
            wanted = list(ranks_for_bytes(spectra, max_bytes, layout, topology, fmt))
    wanted = feasible_ranks(wanted, layout, topology)
    term = TermSpec(layout=layout, topology=topology, ranks=tuple(wanted), formats=(fmt,) * len(topology.legs))
    return realise(tensor, NetworkSpec.of(term, tensor.dtype), metric, sweeps)


def _ranks_within(spectra: Sequence[Tensor], allowed: float, layout: Layout, topology: Topology) -> list[int]:
    """Ranks that cores can have and whose dropped squares are allowed: where the cores cap a rank below what the tolerance
    needs, the ranks around it grow."""
    wanted = list(ranks_for_error(spectra, allowed, layout, topology))
    while True:
        ranks = feasible_ranks(wanted, layout, topology)
        dropped = sum(float(tails(spectrum)[rank]) for spectrum, rank in zip(spectra, ranks))
        grown = [min(rank + 1, len(spectrum)) for spectrum, rank in zip(spectra, wanted)]
        if dropped <= allowed or grown == wanted:
            return ranks
        wanted = grown
