"""Bounds that users of fields think in: the farthest that any entry may be off, and the peak signal-to-noise ratio."""

from __future__ import annotations

from dataclasses import replace
from math import floor, log2, sqrt
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tensornet_compress.coding import CodedFormat
from tensornet_compress.coding.coded_matrix import STEPS_PER_OCTAVE
from tensornet_compress.errors import TensorNetError
from tensornet_compress.searching.layout_search import checked, search
from tensornet_compress.searching.result import Found, SearchResult
from tensornet_compress.tensor import NetworkSpec, TensorNetwork
from tensornet_compress.tensor.network import part_name

# Standard deviations of a network's error that fit in the bound of every entry. Errors have heavier tails than a normal
# distribution: measured on waves and heat, 5 take fewer bytes with their corrections than 3.5 or 8.
_DEVIATIONS = 5.0
# Networks of the front that are this many times less accurate, or more, are no candidates for corrections.
_AROUND = 3.0
_TRIES = 8
_CODES = 1 << 23
_MOST_DECIBELS = 1000


def search_within(
    tensor: Tensor | np.ndarray,
    *,
    max_error: float | None = None,
    max_abs: float | None = None,
    psnr: float | None = None,
    **options: Any,
) -> tuple[SearchResult, TensorNetwork]:
    """``search`` under a bound of another kind; the result of the search, and the network that keeps the bound.

    Args:
        tensor: as for ``search``.
        max_error: relative error.
        max_abs: the farthest that any entry may be off; the network is then a sum of the one that was found and of
            entropy-coded corrections of single entries, and is checked against the bound as it decodes.
        psnr: in decibels, of the range of the entries over the root of their mean squared error. One of these bounds, or
            ``max_bytes``.
        options: others of ``search``.

    >>> import torch, tensornet_compress as tnc
    >>> x = torch.linspace(0, 3, 32)
    >>> field = torch.outer(x.sin(), x.cos()) + (torch.rand(32, 32) > 0.99)
    >>> result, network = tnc.search_within(field, max_abs=0.01)
    >>> bool((network.to_dense() - field).abs().max() <= 0.01)
    True

    Raises:
        TensorNetError: as ``search``; two bounds; one that is not positive, or too fine for corrections.
    """
    given = {"max_error": max_error, "max_abs": max_abs, "psnr": psnr, "max_bytes": options.get("max_bytes")}
    if len([value for value in given.values() if value is not None]) != 1:
        some = {name: value for name, value in given.items() if value is not None}
        raise TensorNetError(f"give exactly one of {', '.join(given)}; {f'was given {some}' if some else 'none was given'}")
    if max_abs is None and psnr is None:
        result = search(tensor, max_error=max_error, **options)
        return result, result.best
    tensor = checked(tensor)
    if not tensor.numel() or not tensor.is_floating_point():
        raise TensorNetError(
            f"a bound of single entries needs floating-point entries, was given {tensor.dtype} of shape {tuple(tensor.shape)}"
        )
    wide = tensor.double()
    if psnr is not None and not -_MOST_DECIBELS < psnr < _MOST_DECIBELS:
        raise TensorNetError(f"psnr must be within {_MOST_DECIBELS} dB, was given {psnr}")
    off = max_abs / _DEVIATIONS if max_abs is not None else float(wide.max() - wide.min()) / 10 ** ((psnr or 0.0) / 20)
    if max_abs is None and not off:
        raise TensorNetError("psnr compares errors with the range of entries, and all of these are equal; give max_abs")
    if not 0 < off < float("inf"):
        raise TensorNetError(f"a bound must be positive and finite, was given {given}")
    norm = float(torch.linalg.vector_norm(wide))
    result = search(tensor, max_error=min(off * sqrt(tensor.numel()) / max(norm, 1e-300), 1.0), **options)
    if max_abs is None:
        return replace(result, limit=f"a PSNR of at least {psnr:g} dB, {result.limit}"), result.best
    near = [found for found in result.pareto if result.error / _AROUND <= found.error <= result.error * _AROUND]
    networks = (corrected(network, tensor, max_abs) for network in (result.best, *(found.network for found in near)))
    network = min(networks, key=lambda network: network.nbytes)
    limit = f"no entry off by more than {max_abs:g}"
    if network is result.best:
        return replace(result, limit=limit), network
    error = float(torch.linalg.vector_norm(network.to_dense(wide.dtype) - wide)) / max(norm, 1e-300)
    choice = Found(f"{result.choice.family} and corrections", network, error, result.choice.ordered)
    return replace(result, best=network, choice=choice, found=(*result.found, choice), limit=limit), network


def corrected(network: TensorNetwork, tensor: Tensor, max_abs: float) -> TensorNetwork:
    """The network, with a term of entropy-coded integers where an entry is off by more than ``max_abs``.

    Raises:
        TensorNetError: the bound is too fine for the coder, or for the precision of the sum.
    """
    dtype = torch.float64 if tensor.dtype == torch.float64 else torch.float32
    missing = tensor.to(dtype) - network.to_dense(dtype)
    farthest = float(missing.abs().max())
    if farthest <= max_abs:
        return network
    if farthest > max_abs * _CODES:
        raise TensorNetError(f"entries are off by up to {farthest:.3g}, for which corrections of {max_abs:.3g} are too fine")
    exponent = floor(STEPS_PER_OCTAVE * log2(2 * max_abs))
    for less in range(_TRIES):
        fmt = CodedFormat(step=2.0 ** ((exponent - less) / STEPS_PER_OCTAVE))
        parts = fmt.encode(missing)
        spec = NetworkSpec.dense(network.spec.shape, fmt.of(parts), network.spec.dtype)
        stored = {part_name(0, 0, part): value for part, value in parts.items()}
        whole = TensorNetwork.sum([network, TensorNetwork(spec, stored)])
        if float((tensor.to(dtype) - whole.to_dense(dtype)).abs().max()) <= max_abs:
            return whole
    raise TensorNetError(f"no corrections keep every entry within {max_abs:.3g}: they are too coarse; allow a wider bound")
