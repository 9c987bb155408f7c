"""Bases of keys and values, learned from second moments; stored in int8 and int16.

A unit is one KV head of one layer; units are numbered layer by layer, head by head, and their channels lie side by side in a
row. Principal axes are those of states weighted by the metric's symmetric square root, in which a unit error costs the same
everywhere.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from tensornet_compress.kv.rope import Rotary

FINE_SHARE = 0.25
_REFINEMENTS = 1
_POSITIONS = torch.arange(0, 4096, 32)


class Shared:
    """Does not change once made, so a copy of what holds it may hold the same one."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self


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

    @staticmethod
    def read(stored: dict[str, Tensor], name: str, rank: int, width: int) -> StoredBasis:
        """The basis stored as ``name``, of the shape it must have (``RuntimeError`` or ``KeyError`` otherwise)."""
        fine, codes = (stored[f"{name}.{part}"].view(-1, width) for part in ("fine", "codes"))
        if len(fine) + len(codes) != rank:
            raise RuntimeError(f"{name} has {len(fine)} + {len(codes)} rows, not {rank}")
        return StoredBasis(fine, codes, stored[f"{name}.scale"].view(rank))

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
class LiveBasis:
    """The basis of one side of one layer of a live cache.

    ``blocks``: state-space basis vectors as rows, in int8; several blocks make a block-diagonal basis. ``deviation``: of each
    coefficient, in the metric, fp32 (channels,); ``mean``: fp32 (channels,).
    """

    blocks: tuple[StoredBasis, ...]
    deviation: Tensor
    mean: Tensor

    def dense(self) -> Tensor:
        """The decoder's rows, fp64 (channels, channels)."""
        return torch.block_diag(*(block.dense() for block in self.blocks)).double()


def live_bases(covariance: Tensor, mean: Tensor, metric: Tensor, heads: list[int], rotary: Rotary | None) -> list[LiveBasis]:
    """One basis per layer of one side. Keys of a live cache keep their rotary positions, so theirs is an average over these.

    Args:
        covariance: plain states of all units, (n, n); mean: (n,); metric: (units, width, width); heads: of every layer.
        rotary: given for keys: second moments and metric are then averaged over positions, and the mean is no longer constant.
    """
    width = metric.shape[-1]
    bases, unit = [], 0
    for count in heads:
        own = slice(unit * width, (unit + count) * width)
        second, centre, blocks = covariance[own, own].double(), mean[own].double(), metric[unit : unit + count].double()
        if rotary is not None:
            second = second + torch.outer(centre, centre)
            grid = second.view(count, width, count, width).permute(0, 2, 1, 3)
            second = rotary.average(grid, _POSITIONS).permute(0, 2, 1, 3).reshape(count * width, -1)
            blocks, centre = rotary.average(blocks, _POSITIONS), torch.zeros_like(centre)
        bases.append(_live_basis(second, centre, blocks))
        unit += count
    return bases


def _live_basis(covariance: Tensor, mean: Tensor, metric: Tensor) -> LiveBasis:
    forward, backward = symmetric_roots(metric)
    weighted = whiten(covariance, forward)
    rows = principal_rows(weighted)
    deviation = torch.einsum("rc,cd,rd->r", rows, weighted, rows).clamp_min(0).sqrt().float().clamp_min(1e-12)
    # Stored rows are those of the decoder, in plain state space; int8 needs one scale each, and their lengths differ anyway.
    return LiveBasis((StoredBasis.store((rows @ torch.block_diag(*backward)).float()),), deviation, mean.float())


def symmetric_roots(metric: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric square roots of positive definite matrices (units, width, width), and their inverses; fp64."""
    values, frames = torch.linalg.eigh(metric.double())
    roots = values.clamp_min(1e-12 * float(values.max()) + 1e-30).sqrt()[:, None]
    return (frames * roots) @ frames.mT, (frames / roots) @ frames.mT


def whiten(covariance: Tensor, metric_root: Tensor) -> Tensor:
    """Covariance (n, n) of states -> covariance of states weighted by ``metric_root`` (units, width, width)."""
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


def smallest(fits: Callable[[float], bool], low: float, high: float, steps: int) -> float:
    """The smallest positive number that fits, where all larger ones fit too: ``steps`` halvings of log ``low`` .. ``high``."""
    for _ in range(steps):
        middle = (low * high) ** 0.5
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high


def rows_of(states: list[Tensor]) -> Tensor:
    """Per layer (heads, tokens, channels) -> (tokens, units * channels)."""
    return torch.cat(states, 0).permute(1, 0, 2).flatten(1).contiguous()


def layers_of(rows: Tensor, heads: list[int], width: int) -> list[Tensor]:
    """The inverse of ``rows_of``."""
    return list(rows.view(len(rows), -1, width).permute(1, 0, 2).split(heads, 0))
