"""A two-level tree network over the (layer, head, channel) legs of one side (keys or values) of a cache.

Leaves are units (one KV head of one layer) and hold the square root of the metric; every group of units has an orthonormal
basis; the root joins the leading components of all groups. Tokens are the growing leg: a row of coefficients each.

Bases are stored in int8 and int16. They are then no longer orthonormal, so coefficients are refined against the stored
basis: what is decoded differs from what was encoded by quantisation of coefficients only.

Which units share a node is searched by mutual information. Units are correlated Gaussian vectors seen through noise of
variance ``noise`` (what the quantiser adds anyway), so the bits that a joint basis saves over separate ones are the mutual
information of its members (the tree criterion of 2209.03196).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor

from tensornet_compress.coding.stored_basis import StoredBasis
from tensornet_compress.decompose.linalg import principal_axes
from tensornet_compress.metric.blocks import whiten


@dataclass(frozen=True)
class SideTree:
    """The network of one side. ``groups[i]``: its units; ``bases[i]``: its basis; ``root`` joins ``joined[i]`` leading
    components of each group (``None``: a forest)."""

    width: int
    mean: Tensor
    metric_root: Tensor
    groups: list[list[int]]
    bases: list[StoredBasis]
    joined: list[int]
    root: StoredBasis | None

    @property
    def components(self) -> int:
        """Coefficients per token."""
        return sum(basis.rank for basis in self.bases)

    def analyse(self, states: Tensor) -> Tensor:
        """States (tokens, units * width) -> coefficients (tokens, components), in which unit errors cost alike."""
        shape = (len(states), -1, self.width)
        centred = (states.float() - self.mean.float()).view(shape)
        whitened = torch.einsum("tuc,ucd->tud", centred, self.metric_root.float()).flatten(1)
        parts = [basis.analyse(whitened[:, unit_channels(group, self.width)]) for group, basis in zip(self.groups, self.bases)]
        if self.root is None:
            return torch.cat(parts, 1)
        top = torch.cat([part[:, :count] for part, count in zip(parts, self.joined)], 1)
        return torch.cat([self.root.analyse(top), *(part[:, n:] for part, n in zip(parts, self.joined))], 1)

    def synthesise(self, coefficients: Tensor) -> Tensor:
        """The inverse: states fp32 (tokens, units * width)."""
        whitened = coefficients.new_empty(len(coefficients), self.mean.numel())
        for group, basis, part in zip(self.groups, self.bases, self._unroot(coefficients)):
            whitened[:, unit_channels(group, self.width)] = basis.synthesise(part)
        shape = (len(coefficients), -1, self.width)
        states = torch.einsum("tuc,ucd->tud", whitened.view(shape), self.metric_root_inverse).flatten(1)
        return states + self.mean.float()

    def _unroot(self, coefficients: Tensor) -> list[Tensor]:
        """Coefficients of the tree -> coefficients of each group's basis."""
        counts = [basis.rank for basis in self.bases]
        if self.root is None:
            return list(coefficients.split(counts, 1))
        split_top = self.root.synthesise(coefficients[:, : self.root.rank]).split(self.joined, 1)
        rest = coefficients[:, self.root.rank :].split([c - n for c, n in zip(counts, self.joined)], 1)
        return [torch.cat(pair, 1) for pair in zip(split_top, rest)]

    @cached_property
    def metric_root_inverse(self) -> Tensor:
        """Inverse of the stored metric roots, fp32 (units, width, width)."""
        return torch.linalg.inv(self.metric_root.double()).float()


def build_tree(covariance: Tensor, mean: Tensor, metric_root: Tensor, groups: list[list[int]], joined: int) -> SideTree:
    """Bases of a tree from second moments.

    Args:
        covariance: of the plain states, fp32 (n, n); mean: (n,); metric_root: symmetric (units, width, width).
        groups: units of each group. joined: leading components of each group that the root joins (0: no root).
    """
    width = metric_root.shape[-1]
    stored_root = metric_root.to(torch.float16)
    weighted = whiten(covariance, stored_root.float())
    channels = [unit_channels(group, width) for group in groups]
    axes = [principal_axes(weighted[own][:, own]) for own in channels]
    bases = [StoredBasis.store(rows) for rows in axes]
    if not joined or len(groups) == 1:
        return SideTree(width, mean.float(), stored_root, groups, bases, [0] * len(groups), None)
    counts = [min(joined, len(rows)) for rows in axes]
    top = torch.empty(sum(counts), len(covariance))
    top[:, torch.cat(channels)] = torch.block_diag(*(rows[:count] for rows, count in zip(axes, counts)))
    root = StoredBasis.store(principal_axes(top @ weighted @ top.T))
    return SideTree(width, mean.float(), stored_root, groups, bases, counts, root)


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


def rows_of(states: list[Tensor]) -> Tensor:
    """Per layer (heads, tokens, channels) -> (tokens, units * channels)."""
    return torch.cat(states, 0).permute(1, 0, 2).flatten(1).contiguous()


def layers_of(rows: Tensor, heads: list[int], width: int) -> list[Tensor]:
    """The inverse of ``rows_of``."""
    return list(rows.view(len(rows), -1, width).permute(1, 0, 2).split(heads, 0))
