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

from tensornet_compress.kv.profile.grouping import unit_channels

_REFINEMENTS = 1
FINE_SHARE = 0.25


@dataclass(frozen=True)
class StoredBasis:
    """Basis vectors as rows, (rank, width), with one fp16 scale a row: the leading rows in int16 (``fine``), the rest in int8.

    A rounded row leaks its coefficient into all others, so rows of large coefficients need more places than rows of small ones.
    """

    fine: Tensor
    codes: Tensor
    scale: Tensor

    @staticmethod
    def store(vectors: Tensor, fine_share: float = FINE_SHARE) -> StoredBasis:
        """Round rows (rank, width), sorted by falling coefficients; the first ``fine_share`` of them finely."""
        fine = round(len(vectors) * fine_share)
        places = torch.full((len(vectors),), 127.0)
        places[:fine] = 32767.0
        scale = (vectors.abs().amax(1) / places).clamp_min(1e-7).to(torch.float16)
        codes = (vectors / scale.float()[:, None]).round()
        codes = codes.maximum(-places[:, None]).minimum(places[:, None])
        return StoredBasis(codes[:fine].to(torch.int16), codes[fine:].to(torch.int8), scale)

    @property
    def rank(self) -> int:
        """Number of basis vectors."""
        return len(self.scale)

    @property
    def width(self) -> int:
        """Length of a basis vector."""
        return self.codes.shape[1]

    def tensors(self) -> dict[str, Tensor]:
        """The stored parts by name."""
        return {"fine": self.fine, "codes": self.codes, "scale": self.scale}

    @property
    def nbytes(self) -> int:
        """Stored bytes."""
        return sum(part.nbytes for part in self.tensors().values())

    def dense(self) -> Tensor:
        """fp32 (rank, width)."""
        return torch.cat([self.fine.float(), self.codes.float()]) * self.scale.float()[:, None]

    def analyse(self, rows: Tensor) -> Tensor:
        """Coefficients (tokens, rank) whose synthesis is nearest to ``rows`` (tokens, width).

        The stored rows are orthonormal up to rounding, so a few fixed-point steps reach the least-squares solution.
        """
        basis = self.dense()
        coefficients = rows @ basis.T
        for _ in range(_REFINEMENTS):
            coefficients = coefficients + (rows - coefficients @ basis) @ basis.T
        return coefficients

    def synthesise(self, coefficients: Tensor) -> Tensor:
        """Rows (tokens, width) of coefficients (tokens, rank)."""
        return coefficients @ self.dense()


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

    @property
    def numbers(self) -> int:
        """Numbers held in the bases."""
        return sum(b.rank * b.width for b in (*self.bases, *([self.root] if self.root else [])))

    @property
    def nbytes(self) -> int:
        """Stored bytes of the side: mean, metric, bases, root."""
        bases = sum(b.nbytes for b in self.bases) + (self.root.nbytes if self.root else 0)
        return self.mean.nbytes + self.metric_root.nbytes + bases

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
        parts = self.unroot(coefficients)
        whitened = coefficients.new_empty(len(coefficients), self.mean.numel())
        for group, basis, part in zip(self.groups, self.bases, parts):
            whitened[:, unit_channels(group, self.width)] = basis.synthesise(part)
        shape = (len(coefficients), -1, self.width)
        states = torch.einsum("tuc,ucd->tud", whitened.view(shape), self.metric_root_inverse).flatten(1)
        return states + self.mean.float()

    def unroot(self, coefficients: Tensor) -> list[Tensor]:
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


def whiten(covariance: Tensor, metric_root: Tensor) -> Tensor:
    """Covariance (n, n) of states -> covariance of metric-weighted states."""
    units, width, _ = metric_root.shape
    blocks = covariance.view(units, width, units, width)
    half = torch.einsum("uab,ubvc->uavc", metric_root, blocks)
    full = torch.einsum("uavc,vcd->uavd", half, metric_root).reshape(len(covariance), -1)
    return (full + full.T) / 2


def principal_rows(covariance: Tensor) -> Tensor:
    """Eigenvectors as rows, by falling variance. In fp32, and in fp64 when that fails to converge."""
    try:
        vectors = torch.linalg.eigh(covariance)[1]
    except torch.linalg.LinAlgError:
        vectors = torch.linalg.eigh(covariance.double())[1].to(covariance.dtype)
    return vectors.flip(1).T.contiguous()


def build_tree(covariance: Tensor, mean: Tensor, metric_root: Tensor, groups: list[list[int]], joined: int) -> SideTree:
    """Bases of a tree from second moments.

    Args:
        covariance: of the plain states, fp32 (n, n); mean: (n,); metric_root: symmetric (units, width, width).
        groups: units of each group. joined: leading components of each group that the root joins (0: no root).
    """
    width = metric_root.shape[-1]
    stored_root = metric_root.to(torch.float16)
    weighted = whiten(covariance, stored_root.float())
    bases, kept = [], []
    for group in groups:
        channels = unit_channels(group, width)
        rows = principal_rows(weighted[channels][:, channels])
        bases.append(StoredBasis.store(rows))
        kept.append(rows)
    if not joined or len(groups) == 1:
        return SideTree(width, mean.float(), stored_root, groups, bases, [0] * len(groups), None)
    counts = [min(joined, len(rows)) for rows in kept]
    top = torch.zeros(sum(counts), len(covariance))
    row = 0
    for group, rows, count in zip(groups, kept, counts):
        top[row : row + count, unit_channels(group, width)] = rows[:count]
        row += count
    root = StoredBasis.store(principal_rows(top @ weighted @ top.T))
    return SideTree(width, mean.float(), stored_root, groups, bases, counts, root)
