"""Hypothesis strategies for layouts, topologies, formats and specs, and the random tensors that go with them."""

from __future__ import annotations

from itertools import pairwise
from math import prod

import torch
from hypothesis import strategies as st
from torch import Tensor

from tensornet_compress.coding import FloatFormat, IntFormat
from tensornet_compress.tensor import FibreOrder, Layout, NetworkSpec, TermSpec, Topology

SEEDS = st.integers(0, 2**31 - 1)


def random_tensor(shape: tuple[int, ...], seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Standard normal entries."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def decaying_tensor(shape: tuple[int, ...], seed: int = 0, dtype: torch.dtype = torch.float64, rate: float = 0.5) -> Tensor:
    """A tensor that low ranks describe well: a sum of rank-one terms with falling weights."""
    total = torch.zeros(shape, dtype=torch.float64)
    for term in range(8):
        vectors = [random_tensor((size,), seed + 97 * term + 13 * axis) for axis, size in enumerate(shape)]
        product = vectors[0]
        for vector in vectors[1:]:
            product = product[..., None] * vector
        total += rate**term * product
    return total.to(dtype)


def correlated_moment(size: int, seed: int = 0, directions: int | None = None) -> Tensor:
    """A second moment with a few strong directions, as layer inputs have: float64 (size, size)."""
    mixing = random_tensor((size, directions or size), seed)
    scales = torch.logspace(1, -2, mixing.shape[1], dtype=torch.float64)
    vectors = random_tensor((8 * size, mixing.shape[1]), seed + 1) * scales
    inputs = vectors @ mixing.T
    return inputs.T @ inputs / len(inputs)


@st.composite
def permutations(draw: st.DrawFn, n: int) -> tuple[int, ...]:
    return tuple(draw(st.permutations(range(n))))


@st.composite
def radices_for(draw: st.DrawFn, size: int) -> tuple[int, ...]:
    """Digits whose product reaches ``size``, exactly or with padding."""
    digits = list(draw(st.lists(st.integers(1, 4), max_size=2)))
    return (*digits, -(-size // prod(digits)))


@st.composite
def layouts(draw: st.DrawFn, shape: tuple[int, ...] | None = None, max_axes: int = 3, max_size: int = 7) -> Layout:
    """Any layout: uneven radices, padding, an order of modes, fibre orders on some axes."""
    if shape is None:
        shape = tuple(draw(st.lists(st.integers(1, max_size), min_size=1, max_size=max_axes)))
    radices = tuple(draw(radices_for(size)) for size in shape)
    order = draw(permutations(sum(map(len, radices))))
    axes = [axis for axis in range(len(shape)) if draw(st.booleans())]
    orders = tuple(
        FibreOrder(axis=axis, permutation=draw(permutations(shape[axis])), absorbed=draw(st.booleans())) for axis in axes
    )
    return Layout.of(radices, shape=shape, mode_order=order, fibre_orders=orders)


@st.composite
def topologies(draw: st.DrawFn, positions: int, max_cores: int = 5) -> Topology:
    """Any tree over the positions, with leg-free transfer cores where the tree allows them."""
    cores = draw(st.integers(1, max_cores))
    owners = [draw(st.integers(0, cores - 1)) for _ in range(positions)]
    parents = [draw(st.integers(0, core - 1)) for core in range(1, cores)]
    legs = [[p for p, owner in enumerate(owners) if owner == core] for core in range(cores)]
    edges = {(parent, core) for core, parent in enumerate(parents, start=1)}
    for core in reversed(range(cores)):
        if not legs[core] and sum(core in edge for edge in edges) < 2:
            return Topology.train([[p] for p in draw(permutations(positions))])
    for core, own in enumerate(legs):
        legs[core] = draw(st.permutations(own))
    return Topology(legs=tuple(map(tuple, legs)), edges=tuple(sorted(edges)))


@st.composite
def named_topologies(draw: st.DrawFn, positions: int) -> Topology:
    """One core, a cut, a train in any order, a balanced tree, or any tree."""
    order = draw(permutations(positions))
    kinds = [Topology.one_core(positions), Topology.train([[p] for p in order]), Topology.balanced_tree(order)]
    if positions > 1:
        kinds.append(Topology.two_cores(positions, order[: draw(st.integers(1, positions - 1))]))
    return draw(st.sampled_from(kinds) | topologies(positions))


INT_FORMATS = st.builds(
    IntFormat,
    bits=st.integers(2, 8),
    group=st.sampled_from([0, 3, 8, 32, 64]),
    zero=st.sampled_from(["none", "int", "float"]),
    scale_dtype=st.sampled_from(["fp16", "bf16", "fp32"]),
)
FLOAT_FORMATS = st.builds(FloatFormat, dtype=st.sampled_from(["fp32", "bf16", "fp16"]))
FORMATS = INT_FORMATS | FLOAT_FORMATS
FP32 = FloatFormat(dtype="fp32")


@st.composite
def terms(draw: st.DrawFn, shape: tuple[int, ...], formats: st.SearchStrategy = FORMATS, max_rank: int = 3) -> TermSpec:
    layout = draw(layouts(shape))
    topology = draw(named_topologies(len(layout.dims)))
    ranks = tuple(draw(st.integers(1, max_rank)) for _ in topology.edges)
    return TermSpec(layout=layout, topology=topology, ranks=ranks, formats=tuple(draw(formats) for _ in topology.legs))


@st.composite
def specs(
    draw: st.DrawFn, shape: tuple[int, ...] | None = None, formats: st.SearchStrategy = FORMATS, max_terms: int = 2
) -> NetworkSpec:
    if shape is None:
        shape = tuple(draw(st.lists(st.integers(1, 6), min_size=1, max_size=3)))
    count = draw(st.integers(1, max_terms))
    return NetworkSpec(shape=shape, terms=tuple(draw(terms(shape, formats)) for _ in range(count)))


def random_cores(term: TermSpec, seed: int = 0, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Normal numbers for every core of a term."""
    return [random_tensor(term.core_shape(core), seed + core, dtype) for core in range(len(term.formats))]


def train_cores_of(cores: list[Tensor]) -> list[Tensor]:
    """Cores of a one-leg-each train with boundary bonds of size 1, as other libraries keep them."""
    if len(cores) == 1:
        return [cores[0].reshape(1, -1, 1)]
    return [cores[0][None], *cores[1:-1], cores[-1][..., None]]


def is_path(topology: Topology) -> bool:
    """Edges (0, 1), (1, 2) ... with a leg everywhere."""
    return all(topology.legs) and topology.edges == tuple(pairwise(range(len(topology.legs))))
