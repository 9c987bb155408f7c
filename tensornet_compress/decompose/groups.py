"""Which units of channels share a basis: a search by mutual information.

Units are correlated Gaussian vectors seen through noise of variance ``noise`` (what a quantiser adds anyway), so the bits that
a joint basis saves over separate ones are the mutual information of its members (the tree criterion of 2209.03196).
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor


def joint_bits(covariance: Tensor, noise: float, channels: Tensor) -> float:
    """Bits per token of the channels coded jointly: 1/2 log2 det(I + C / noise)."""
    block = covariance[channels][:, channels].double() / noise
    block.diagonal().add_(1.0)
    factor, info = torch.linalg.cholesky_ex(block)
    if int(info):
        values = torch.linalg.eigvalsh(block).clamp_min(1.0)
        return float(0.5 * values.log2().sum())
    return float(factor.diagonal().log2().sum())


def pair_information(covariance: Tensor, noise: float, width: int) -> Tensor:
    """Mutual information in bits between every pair of units of ``width`` channels, symmetric (units, units), zero diagonal."""
    units = len(covariance) // width
    blocks = covariance.double().view(units, width, units, width).permute(0, 2, 1, 3) / noise
    own = blocks[torch.arange(units), torch.arange(units)] + torch.eye(width, dtype=torch.float64)
    alone = _half_logdet(own)
    found = torch.zeros(units, units)
    for i in range(units - 1):
        later = torch.arange(i + 1, units)
        top = torch.cat([own[i].expand(len(later), -1, -1), blocks[i, later]], 2)
        bottom = torch.cat([blocks[i, later].mT, own[later]], 2)
        shared = alone[i] + alone[later] - _half_logdet(torch.cat([top, bottom], 1))
        found[i, later] = found[later, i] = shared.clamp_min(0).float()
    return found


def consecutive_groups(units: int, size: int) -> list[list[int]]:
    """Units in their own order, cut in groups of at most ``size``, as even as can be."""
    count = -(-units // size)
    edges = [round(i * units / count) for i in range(count + 1)]
    return [list(range(a, b)) for a, b in pairwise(edges)]


def search_groups(covariance: Tensor, noise: float, width: int, size: int) -> tuple[list[list[int]], dict[str, float]]:
    """Groups of at most ``size`` units with the least total ``joint_bits``: (groups, bits of each candidate).

    Candidates: the native order, and swap-refined starts from the native and the spectral (Fiedler) order of the pairwise
    mutual information. Pairs only approximate a group's joint information, so the final choice compares joint bits; the native
    order always takes part and wins ties.
    """
    units = len(covariance) // width
    native = consecutive_groups(units, size)
    if len(native) == 1:
        return native, {}
    information = pair_information(covariance, noise, width)
    laplacian = torch.diag(information.sum(1)) - information
    fiedler = torch.linalg.eigh(laplacian.double())[1][:, 1].argsort().tolist()
    candidates = {
        "native": native,
        "native, swapped": _swap_refine(information, native),
        "spectral, swapped": _swap_refine(information, [[fiedler[u] for u in group] for group in native]),
    }
    bits = {
        name: sum(joint_bits(covariance, noise, unit_channels(group, width)) for group in groups)
        for name, groups in candidates.items()
    }
    best = min(bits, key=lambda name: bits[name])
    return candidates[best], bits


def unit_channels(units: list[int], width: int) -> Tensor:
    """Channel indices of units of ``width`` channels each."""
    return (torch.tensor(units)[:, None] * width + torch.arange(width)).flatten()


def _swap_refine(information: Tensor, groups: list[list[int]]) -> list[list[int]]:
    """Swap the best pair of units between groups until no swap raises the information inside groups."""
    units = len(information)
    label = torch.empty(units, dtype=torch.long)
    for index, group in enumerate(groups):
        label[torch.tensor(group)] = index
    everyone = torch.arange(units)
    for _ in range(units * units):
        toward = torch.stack([information[:, label == index].sum(1) for index in range(len(groups))], 1)
        move = toward[:, label] - toward[everyone, label][:, None]
        gain = move + move.T - 2 * information
        gain[label[:, None] == label[None]] = -1.0
        best, where = gain.flatten().max(0)
        if best <= 1e-6:
            break
        i, j = int(where) // units, int(where) % units
        label[[i, j]] = label[[j, i]]
    return [torch.nonzero(label == index).flatten().tolist() for index in range(len(groups))]


def _half_logdet(matrices: Tensor) -> Tensor:
    """1/2 log2 det of positive definite matrices (count, n, n)."""
    return torch.linalg.cholesky(matrices).diagonal(dim1=-2, dim2=-1).log2().sum(-1)
