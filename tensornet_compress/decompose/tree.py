"""Decomposition of a laid-out tensor over any tree by successive truncated SVDs (TT-SVD; hierarchical SVD)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from math import prod

import networkx as nx
from torch import Tensor

from tensornet_compress.decompose.linalg import require_finite, working_dtype
from tensornet_compress.decompose.tensorly_adapter import train_cores, truncated_svd
from tensornet_compress.metric import KroneckerMetric
from tensornet_compress.tensor import Topology


def decompose_tree(laid_out: Tensor, topology: Topology, ranks: Sequence[int]) -> tuple[list[Tensor], tuple[int, ...]]:
    """Cores of ``laid_out`` over ``topology`` and the ranks in fact used (a rank that an unfolding cannot have is lowered).

    The squared error is at most the sum over bonds of the squared singular values dropped from the unfoldings of the
    whole tensor, and at least the largest of these. All SVDs go through tensorly.
    """
    require_finite(laid_out, "tensor")
    decompose = _decompose_chain if topology.is_chain else _decompose_from_leaves
    return decompose(laid_out.to(working_dtype(laid_out.dtype)), topology, ranks)


def _decompose_chain(laid_out: Tensor, topology: Topology, ranks: Sequence[int]) -> tuple[list[Tensor], tuple[int, ...]]:
    grouped = laid_out.permute([position for legs in topology.legs for position in legs])
    leg_sizes = [[laid_out.shape[position] for position in legs] for legs in topology.legs]
    cores = train_cores(grouped.reshape([prod(sizes) for sizes in leg_sizes]), ranks)
    used = tuple(core.shape[2] for core in cores[:-1])
    shaped = []
    for number, (core, sizes) in enumerate(zip(cores, leg_sizes)):
        left = [core.shape[0]] if number > 0 else []
        right = [core.shape[2]] if number < len(cores) - 1 else []
        shaped.append(core.reshape(*left, *sizes, *right).contiguous())
    return shaped, used


def _decompose_from_leaves(laid_out: Tensor, topology: Topology, ranks: Sequence[int]) -> tuple[list[Tensor], tuple[int, ...]]:
    root = _root(topology)
    labels = [f"p{position}" for position in range(topology.positions)]
    rest, used, cores = laid_out, list(ranks), {}
    for core, parent in reversed(list(nx.bfs_predecessors(topology.graph(), root))):
        bond = topology.edges.index((min(core, parent), max(core, parent)))
        own = [label for label in topology.core_labels(core) if label != f"b{bond}"]
        others = [label for label in labels if label not in own]
        sizes = [rest.shape[labels.index(label)] for label in own]
        matrix = rest.permute([labels.index(label) for label in (*own, *others)]).reshape(prod(sizes), -1)
        U, S, Vh = truncated_svd(matrix, min(ranks[bond], *matrix.shape))
        used[bond] = len(S)
        cores[core] = _arrange(U.reshape(*sizes, len(S)), [*own, f"b{bond}"], topology, core)
        remaining = [rest.shape[labels.index(label)] for label in others]
        rest, labels = (S[:, None] * Vh).reshape(len(S), *remaining), [f"b{bond}", *others]
    cores[root] = _arrange(rest, labels, topology, root)
    return [cores[core] for core in range(len(topology.legs))], tuple(used)


def _arrange(tensor: Tensor, labels: Sequence[str], topology: Topology, core: int) -> Tensor:
    return tensor.permute([labels.index(label) for label in topology.core_labels(core)]).contiguous()


def core_metric(topology: Topology, cores: Sequence[Tensor], core: int, metric: KroneckerMetric) -> KroneckerMetric:
    """What errors of a core, as a matrix (first axis, all others), cost in the whole tensor, at the mean price of ``metric``.

    Cores are orthonormal towards the root, as ``decompose_tree`` leaves them, so only the bond that leads there weighs: each of
    its indices by the squared norm of what the rest of the network makes of it.
    """
    root = _root(topology)
    weight: Tensor | None = None
    upward, labels, path = "", topology.core_labels, nx.shortest_path(topology.graph(), root, core)
    for parent, child in pairwise(path):
        bond = f"b{topology.edges.index((min(parent, child), max(parent, child)))}"
        squares = cores[parent].double().square()
        if weight is not None:
            squares = squares * _along(weight, squares.ndim, labels(parent).index(upward))
        axis = labels(parent).index(bond)
        weight, upward = squares.movedim(axis, 0).flatten(1).sum(1).clamp_min(1e-300), bond
    rate = (1.0 if metric.rate is None else metric.rate) * metric.mean_price
    if weight is None:
        return KroneckerMetric(rate=rate)
    axis, shape = labels(core).index(upward), cores[core].shape
    if axis == 0:
        return KroneckerMetric(rows=weight, rate=rate)
    return KroneckerMetric(columns=_along(weight, len(shape) - 1, axis - 1).expand(shape[1:]).flatten(), rate=rate)


def _along(weight: Tensor, ndim: int, axis: int) -> Tensor:
    return weight.view([len(weight) if i == axis else 1 for i in range(ndim)])


def _root(topology: Topology) -> int:
    """The core that holds the norm after decomposition: the last of a chain, the middle of other trees."""
    return len(topology.legs) - 1 if topology.is_chain else int(nx.center(topology.graph())[0])
