"""Rounding: lower the ranks of a network in place of decomposing its dense tensor again (Oseledets 2011, algorithm 2)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import networkx as nx
import torch
from torch import Tensor

from tensornet_compress.decompose.linalg import fix_signs, svd
from tensornet_compress.decompose.ranks import tails
from tensornet_compress.errors import TensorNetError
from tensornet_compress.tensor import Topology


def round_cores(
    cores: Sequence[Tensor],
    topology: Topology,
    max_error: float | None = None,
    max_ranks: Sequence[int] | None = None,
) -> tuple[list[Tensor], tuple[int, ...], list[Tensor]]:
    """Cores of lower rank, the new ranks, and the spectrum of each bond as met on the way.

    ``max_error`` is relative (Frobenius): the result differs by at most ``max_error * norm``. ``max_ranks`` caps each bond.
    Works on any tree without forming the dense tensor.

    >>> import torch
    >>> import tensornet_compress as tnc
    >>> cores = [torch.ones(6, 3), torch.ones(3, 5, 3), torch.ones(3, 4)]
    >>> smaller, ranks, _ = tnc.round_cores(cores, tnc.Topology.train(3), max_error=1e-6)
    >>> ranks, [tuple(core.shape) for core in smaller]
    ((1, 1), [(6, 1), (1, 5, 1), (1, 4)])
    """
    if max_error is not None and max_error < 0:
        raise TensorNetError(f"max_error must not be negative, was given {max_error}")
    work = _Canonical(cores, topology)
    root = nx.center(topology.graph())[0]
    for core, parent in reversed(list(nx.bfs_predecessors(topology.graph(), root))):
        work.push(core, parent)
    norm = float(work.cores[root].norm())
    allowance = (max_error or 0.0) ** 2 * norm**2 / max(1, len(topology.edges))
    spectra: dict[int, Tensor] = {}
    for source, target in _moves(topology, root):
        bond = topology.edges.index((min(source, target), max(source, target)))
        if bond in spectra:
            work.push(source, target)
            continue
        cap = max_ranks[bond] if max_ranks is not None else None
        spectra[bond] = work.truncate(source, target, bond, allowance, cap)
    ranks = tuple(work.rank(bond) for bond in range(len(topology.edges)))
    return work.cores, ranks, [spectra[bond] for bond in range(len(topology.edges))]


def _moves(topology: Topology, root: int) -> list[tuple[int, int]]:
    """Walk of the orthogonality centre over every bond, down and up again."""
    moves = []
    for source, target, kind in nx.dfs_labeled_edges(topology.graph(), root):
        if source != target and kind == "forward":
            moves.append((source, target))
        elif source != target and kind == "reverse":
            moves.append((target, source))
    return moves


class _Canonical:
    """Cores with an orthogonality centre that can be pushed along bonds."""

    def __init__(self, cores: Sequence[Tensor], topology: Topology):
        self.cores = [core.clone() for core in cores]
        self.topology = topology

    def rank(self, bond: int) -> int:
        core = self.topology.edges[bond][0]
        return self.cores[core].shape[self.topology.core_labels(core).index(f"b{bond}")]

    def push(self, source: int, target: int) -> None:
        """Make ``source`` orthonormal towards ``target`` by QR."""
        matrix, bond, restore = self._matrix(source, target)
        Q, R = torch.linalg.qr(matrix)
        self.cores[source] = restore(Q)
        self._absorb(target, bond, R)

    def truncate(self, source: int, target: int, bond: int, allowance: float, cap: int | None) -> Tensor:
        """Drop singular values of squared sum at most ``allowance`` at the bond; the centre moves to ``target``."""
        matrix, _, restore = self._matrix(source, target)
        U, S, Vh = svd(matrix)
        U, Vh = fix_signs(U, Vh)
        enough = int((tails(S.double()) > allowance).sum())
        rank = max(1, min(enough, cap if cap is not None else len(S)))
        self.cores[source] = restore(U[:, :rank])
        self._absorb(target, bond, S[:rank, None] * Vh[:rank])
        return S

    def _matrix(self, source: int, target: int) -> tuple[Tensor, int, Callable[[Tensor], Tensor]]:
        bond = self.topology.edges.index((min(source, target), max(source, target)))
        axis = self.topology.core_labels(source).index(f"b{bond}")
        moved = self.cores[source].movedim(axis, -1)
        kept = moved.shape[:-1]

        def restore(matrix: Tensor) -> Tensor:
            return matrix.reshape(*kept, matrix.shape[1]).movedim(-1, axis).contiguous()

        return moved.reshape(-1, moved.shape[-1]), bond, restore

    def _absorb(self, core: int, bond: int, factor: Tensor) -> None:
        axis = self.topology.core_labels(core).index(f"b{bond}")
        self.cores[core] = torch.tensordot(factor, self.cores[core], dims=([1], [axis])).movedim(0, axis).contiguous()
