"""A two-level tree network over the (layer, head, channel) legs of one side (keys or values) of a cache.

Leaves are units (one KV head of one layer) and hold the square root of the metric; every group of units has an orthonormal
basis; the root joins the leading components of all groups. Tokens are the growing leg: a row of coefficients each.

Bases are stored in int8 and int16. They are then no longer orthonormal, so coefficients are refined against the stored
basis: what is decoded differs from what was encoded by quantisation of coefficients only.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from tensornet_compress.coding.stored_basis import StoredBasis
from tensornet_compress.decompose.groups import unit_channels
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


def rows_of(states: list[Tensor]) -> Tensor:
    """Per layer (heads, tokens, channels) -> (tokens, units * channels)."""
    return torch.cat(states, 0).permute(1, 0, 2).flatten(1).contiguous()


def layers_of(rows: Tensor, heads: list[int], width: int) -> list[Tensor]:
    """The inverse of ``rows_of``."""
    return list(rows.view(len(rows), -1, width).permute(1, 0, 2).split(heads, 0))
