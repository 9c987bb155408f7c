"""An integer base with a low-rank residual, fitted in turns, against fitting once and against the base alone."""

import pytest
import torch

from tensornet_compress.coding import parse_format
from tensornet_compress.decompose import alternate_terms, realise
from tensornet_compress.errors import TensorNetError
from tensornet_compress.metric import KroneckerMetric
from tensornet_compress.tensor import Layout, NetworkSpec, TermSpec, Topology
from tests.generators import correlated_moment, random_tensor

SHAPE = (24, 32)


def term(topology, ranks, *formats):
    return TermSpec(
        layout=Layout.native(SHAPE), topology=topology, ranks=ranks, formats=tuple(parse_format(name) for name in formats)
    )


BASE = term(Topology.one_core(2), (), "int2g16o")
RESIDUAL = term(Topology.two_cores(2, (0,)), (3,), "bf16", "bf16")


def weight_of(seed):
    """Noise with a few strong directions, which waste the grids of an integer base."""
    return (0.1 * random_tensor(SHAPE, seed) + random_tensor((24, 3), seed + 1) @ random_tensor((3, 32), seed + 2)).float()


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("terms", [(BASE, RESIDUAL), (RESIDUAL, BASE)])
def test_turns_beat_fitting_once_and_the_reported_error_is_true(seed, terms):
    weight, metric = weight_of(10 * seed), KroneckerMetric(columns=correlated_moment(32, seed))
    spec = NetworkSpec(shape=SHAPE, terms=terms)
    network, errors = alternate_terms(weight, spec, metric)
    assert network.spec == spec
    assert network.nbytes == spec.nbytes
    once = metric.norm2(weight - realise(weight, spec, metric).to_dense())
    assert errors[0] == pytest.approx(once, rel=1e-4)
    assert metric.norm2(weight - network.to_dense()) == pytest.approx(min(errors), rel=1e-4)
    assert min(errors) <= errors[0]
    alone = metric.norm2(weight - realise(weight, NetworkSpec(shape=SHAPE, terms=(BASE,)), metric).to_dense())
    assert min(errors) < 0.5 * alone


def test_turns_gain_over_a_base_that_was_fitted_first():
    """The base alone spends its range on directions that the residual can hold."""
    metric = KroneckerMetric()
    gains = []
    for seed in range(4):
        _, errors = alternate_terms(weight_of(10 * seed), NetworkSpec(shape=SHAPE, terms=(BASE, RESIDUAL)), metric, rounds=6)
        gains.append(min(errors) / errors[0])
    assert torch.tensor(gains).mean() < 0.9


def test_one_term_cannot_take_turns():
    with pytest.raises(TensorNetError, match="two or more"):
        alternate_terms(torch.ones(SHAPE), NetworkSpec(shape=SHAPE, terms=(BASE,)))
