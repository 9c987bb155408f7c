import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tensornet_compress as tnc
from tensornet_compress.decompose import decompose_tree, feasible_ranks, refine_cores
from tensornet_compress.metric import KroneckerMetric, euclidean, input_second_moment
from tensornet_compress.tensor import TermSpec, contract_term
from tests.generators import FP32, SEEDS, correlated_moment, layouts, named_topologies, random_cores, random_tensor


def metrics(shape, seed):
    rows, columns = shape[0], math.prod(shape[1:])
    return [
        euclidean(),
        input_second_moment(correlated_moment(columns, seed)),
        KroneckerMetric(rows=random_tensor((rows,), seed).exp()),
        KroneckerMetric(rows=correlated_moment(rows, seed), columns=correlated_moment(columns, seed + 1)),
    ]


@st.composite
def networks(draw):
    shape = tuple(draw(st.lists(st.integers(2, 5), min_size=2, max_size=3)))
    layout = draw(layouts(shape))
    topology = draw(named_topologies(len(layout.dims)))
    ranks = feasible_ranks([draw(st.integers(1, 3)) for _ in topology.edges], layout, topology)
    return TermSpec(layout=layout, topology=topology, ranks=tuple(ranks), formats=(FP32,) * len(topology.legs))


@settings(max_examples=15)
@given(networks(), SEEDS, st.integers(0, 3), st.booleans())
def test_refinement_never_raises_the_error(term, seed, choice, from_svd):
    target = random_tensor(term.layout.shape, seed)
    metric = metrics(term.layout.shape, seed)[choice]
    cores = random_cores(term, seed, torch.float64)
    if from_svd:
        cores, ranks = decompose_tree(term.layout.apply(target), term.topology, term.ranks)
        term = term.model_copy(update={"ranks": ranks})
    refined, errors = refine_cores(cores, term, target, metric, sweeps=3)
    assert all(after <= before * (1 + 1e-9) for before, after in pairwise(errors))
    residual = (target - contract_term(term, refined)).reshape(target.shape[0], -1)
    assert metric.norm2(residual) == pytest.approx(errors[-1], rel=1e-6, abs=1e-9 * metric.norm2(target.flatten(1)))


@settings(max_examples=10)
@given(SEEDS, st.integers(1, 3))
def test_two_cores_reach_the_svd_optimum_from_a_random_start(seed, rank):
    target = random_tensor((6, 5), seed)
    term = TermSpec(
        layout=tnc.Layout.native((6, 5)), topology=tnc.Topology.two_cores(2, (0,)), ranks=(rank,), formats=(FP32, FP32)
    )
    cores = random_cores(term, seed + 7, torch.float64)
    _, errors = refine_cores(cores, term, target, euclidean(), sweeps=500, iterations=20, tolerance=1e-10)
    optimum = float(torch.linalg.svdvals(target)[rank:].square().sum())
    assert errors[-1] >= optimum * (1 - 1e-9)
    assert errors[-1] <= optimum * 1.02 + 1e-9


@settings(max_examples=10)
@given(SEEDS)
def test_one_core_is_solved_exactly(seed):
    target = random_tensor((4, 6), seed)
    term = TermSpec(layout=tnc.Layout.native((4, 6)), topology=tnc.Topology.one_core(2), ranks=(), formats=(FP32,))
    refined, errors = refine_cores([torch.zeros(4, 6, dtype=torch.float64)], term, target, euclidean())
    assert torch.allclose(refined[0], target)
    assert errors[-1] <= 1e-12 * errors[0]


def test_only_free_cores_change():
    term = TermSpec(layout=tnc.Layout.native((4, 3, 5)), topology=tnc.Topology.train(3), ranks=(2, 2), formats=(FP32,) * 3)
    cores = random_cores(term, 3, torch.float64)
    refined, errors = refine_cores(cores, term, random_tensor((4, 3, 5), 1), euclidean(), only=[1])
    assert torch.equal(refined[0], cores[0])
    assert torch.equal(refined[2], cores[2])
    assert errors[-1] < errors[0]


@settings(max_examples=10)
@given(SEEDS)
def test_refinement_in_a_metric_beats_the_euclidean_train_there(seed):
    """Trains are decomposed in the Euclidean norm; ALS then moves them towards what the metric prices."""
    weight = random_tensor((12, 16), seed)
    metric = input_second_moment(correlated_moment(16, seed))
    layout = tnc.Layout.of(((3, 4), (4, 4)))
    topology = tnc.Topology.train(4)
    plain = tnc.to_network(weight, topology, layout, ranks=3)
    refined = tnc.to_network(weight, topology, layout, ranks=3, metric=metric, sweeps=4)
    errors = [metric.norm2(weight - network.to_dense(torch.float64)) for network in (plain, refined)]
    assert refined.spec == plain.spec
    assert errors[1] < errors[0]
