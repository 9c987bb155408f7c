"""TTNOpt (2505.05908, Apache-2.0) as a peer: the tree that its structure search finds for a tensor.

Two favours are done to it. Its own start (``TreeTensorNetwork.mps``) loses an orthogonal factor, which leaves errors of up to
twice the norm, and cannot make four modes at all: it gets an exact start of the same shape, without singular values that are
rounding noise. And bonds that save nothing are merged, as in our own trees.
"""

from __future__ import annotations

import contextlib
import io
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import numpy as np
import opt_einsum
from torch import Tensor

from tensornet_compress.bench.peer_packages import SIDE, Unavailable
from tensornet_compress.bench.registry import Method
from tensornet_compress.bench.search_case import SEARCH_METHODS, SearchCase, Stored
from tensornet_compress.coding import parse_format
from tensornet_compress.decompose import realise
from tensornet_compress.options.offered import SEARCH_CORE_FORMATS, fine_digits
from tensornet_compress.searching import SpectrumStore
from tensornet_compress.searching.candidates import Shape, predicted
from tensornet_compress.searching.limits import Limit, View
from tensornet_compress.searching.topologies import merged
from tensornet_compress.tensor import NetworkSpec, Topology

_NOISE = 1e-10
_ANY = 1 << 30
LARGEST = 1 << 16
_SLACKS = (1.0, 0.97, 0.94, 1.03, 1.1, 1.2, 1.4)


@dataclass(frozen=True)
class Tree:
    """What it found: the topology over the axes of the tensor, numbers after merging cores, error and seconds."""

    topology: Topology
    merged_numbers: int
    error: float
    seconds: float


def optimal_tree(tensor: Tensor, cut: float, sweeps: int) -> Tree:
    """Its structure search by least entanglement entropy; singular values below ``cut`` of the largest are dropped."""
    package: Any = SIDE.module("ttnopt")
    array = tensor.double().numpy()
    began = perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):
        psi = _start(array, package.TreeTensorNetwork)
        engine = package.FactorizeTensor(psi, max_bond_dim=_ANY)
        engine.run(target=None, opt_structure=1, max_num_sweep=sweeps, tau=1, max_truncation_error=cut)
    seconds = perf_counter() - began
    error = float(np.linalg.norm(_dense(psi) - array) / np.linalg.norm(array))
    topology, ranks = _topology(psi)
    return Tree(topology, _merged_numbers(topology, ranks, array.shape), error, seconds)


def _start(array: np.ndarray, network: Any) -> Any:
    """An exact network of the shape that ``TreeTensorNetwork.mps`` has."""
    count, dims, norm = array.ndim, array.shape, float(np.linalg.norm(array))
    edges = [[0, 1, 4], [2, 3, 4]] if count == 4 else [list(edge) for edge in network.mps(count).edges]
    left = max(1, (count - 2) // 2)
    heads, tails = [], []
    rest, bond = array / norm, dims[0]
    for place in range(1, left + 1):
        u, s, v = _svd(rest.reshape(bond * dims[place], -1))
        heads.append(u.reshape(bond, dims[place], -1))
        rest, bond = s[:, None] * v, len(s)
    width = dims[-1]
    for place in reversed(range(left + 1, count - 1)):
        u, s, v = _svd(rest.reshape(-1, dims[place] * width))
        tails.append(v.reshape(len(s), dims[place], width).transpose(1, 2, 0))
        rest, width = u * s, len(s)
    u, s, v = _svd(rest.reshape(bond, width))
    heads[-1], tails[-1] = heads[-1] @ u, tails[-1] @ v.T
    return network(edges, heads + tails[::-1], gauge_tensor=np.diag(s), norm=norm)


def _svd(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    u, s, v = np.linalg.svd(matrix, full_matrices=False)
    kept = max(1, int((s > _NOISE * s[0]).sum()))
    return u[:, :kept], s[:kept], v[:kept]


def _dense(psi: Any) -> np.ndarray:
    centre, second = psi.canonical_center_edge_id, psi.central_tensor_ids()[1]
    other = max(max(edges) for edges in psi.edges) + 1
    operands: list[Any] = []
    for number, (core, edges) in enumerate(zip(psi.tensors, psi.edges)):
        operands += [core, [other if number == second and edge == centre else edge for edge in edges]]
    operands += [psi.gauge_tensor, [centre, other]]
    return psi.norm * np.asarray(opt_einsum.contract(*operands, list(range(psi.size))))


def _topology(psi: Any) -> tuple[Topology, tuple[int, ...]]:
    owners: dict[int, list[int]] = {}
    widths: dict[int, int] = {}
    for core, edges in enumerate(psi.edges):
        for axis, edge in enumerate(edges):
            owners.setdefault(int(edge), []).append(core)
            widths[int(edge)] = psi.tensors[core].shape[axis]
    legs = tuple(tuple(int(e) for e in edges if len(owners[int(e)]) == 1) for edges in psi.edges)
    bonds = sorted((tuple(sorted(cores)), widths[edge]) for edge, cores in owners.items() if len(cores) == 2)
    return Topology(legs=legs, edges=tuple((a, b) for (a, b), _ in bonds)), tuple(width for _, width in bonds)


def _merged_numbers(topology: Topology, ranks: tuple[int, ...], dims: tuple[int, ...]) -> int:
    """Numbers after merging cores; ranks of surviving bonds stay."""
    sides = {frozenset(topology.side(bond)): rank for bond, rank in enumerate(ranks)}
    everything = frozenset(range(len(dims)))
    simpler = merged(topology, dims, ranks)
    width = [
        sides.get(frozenset(simpler.side(bond)), sides.get(everything - frozenset(simpler.side(bond)), 0))
        for bond in range(len(simpler.edges))
    ]
    total = 0
    for core, legs in enumerate(simpler.legs):
        total += int(np.prod([dims[p] for p in legs]) * np.prod([width[bond] for bond in simpler.bonds_of(core)]))
    return total


def ttnopt(case: SearchCase, error: float) -> Stored:
    """Its tree over the same digits as ours, with our ranks and formats. Raises ``Unavailable`` where it is not installed, or
    the tensor is too large or needs more bytes than dense integers."""
    SIDE.module("ttnopt")
    tensor = case.tensor
    if tensor.numel() > LARGEST:
        raise Unavailable(f"{tensor.numel():,} entries, more than {LARGEST:,}: its four-legged tensors would take hours")
    tensorization = fine_digits(tuple(tensor.shape))
    store = SpectrumStore(tensorization.apply(tensor))
    tree = optimal_tree(store.modes, 1e-3 * error, 2)
    shape = Shape("ttnopt", tensorization, tree.topology, ordered=True)
    kept: list[tuple[int, float]] = []
    for name in SEARCH_CORE_FORMATS:
        for slack in _SLACKS:
            candidate = predicted(shape, View(store, Limit(error)), parse_format(name), slack)
            if candidate is None or candidate.nbytes > 1.3 * min([*(nbytes for nbytes, _ in kept), tensor.numel()]):
                continue
            network = realise(tensor, NetworkSpec(shape=tuple(tensor.shape), terms=(candidate.term,)))
            measured = float((network.to_dense() - tensor).norm() / tensor.norm())
            if measured <= error:
                kept.append((network.nbytes, measured))
    if not kept:
        raise Unavailable("more bytes than 1.3 of 8 bit integers")
    return Stored(*min(kept), settings={"structure_search_seconds": tree.seconds})


SEARCH_METHODS.add(Method("ttnopt", ttnopt, "TTNOpt's structure search, ranks and formats by our rule"))
