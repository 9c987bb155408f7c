from importlib import import_module

import pytest
import torch
from hypothesis import given, settings

import tensornet_compress as tnc
from tensornet_compress.coding import parse_format
from tensornet_compress.decompose import ErrorFeedback, alternate_terms, feasible_ranks, realise
from tensornet_compress.errors import TensorNetError
from tensornet_compress.metric import KroneckerMetric
from tensornet_compress.tensor import Layout, NetworkSpec, TermSpec, Topology
from tests.generators import FP32, SEEDS, correlated_moment, decaying_tensor, random_tensor, specs


@settings(max_examples=40)
@given(specs(), SEEDS)
def test_what_is_realised_is_what_the_spec_says(spec, seed):
    terms = tuple(
        term.model_copy(update={"ranks": tuple(feasible_ranks(term.ranks, term.layout, term.topology))}) for term in spec.terms
    )
    spec = spec.model_copy(update={"terms": terms})
    tensor = random_tensor(spec.shape, seed, torch.float32)
    network = tnc.realise(tensor, spec)
    assert network.spec == spec
    assert network.nbytes == spec.nbytes
    again = tnc.realise(tensor, spec)
    assert all(torch.equal(network.stored[name], again.stored[name]) for name in network.stored)


def test_a_sum_fits_what_the_first_term_left():
    tensor = decaying_tensor((8, 9), 1)
    low = tnc.to_network(tensor, ranks=2).spec.terms[0]
    layout = tnc.Layout.of(((2, 4), (3, 3)), mode_order=(0, 2, 1, 3))
    rest = tnc.to_network(tensor, tnc.Topology.two_cores(4, (0, 1)), layout, ranks=2).spec.terms[0]
    errors = [
        float((tnc.realise(tensor, NetworkSpec(shape=(8, 9), terms=terms)).to_dense(torch.float64) - tensor).norm())
        for terms in ((low,), (low, rest), (low, rest, rest))
    ]
    assert errors[0] > errors[1] > errors[2]


def test_a_rank_that_the_tensor_cannot_have_is_refused():
    for topology, layout in (
        (tnc.Topology.two_cores(2, (0,)), tnc.Layout.native((3, 4))),
        (tnc.Topology.train(3), tnc.Layout.of(((3,), (2, 2)))),
    ):
        term = TermSpec(
            layout=layout, topology=topology, ranks=(9,) * len(topology.edges), formats=(FP32,) * len(topology.legs)
        )
        with pytest.raises(TensorNetError, match="bond 0 asks for rank 9"):
            tnc.realise(torch.ones(3, 4), NetworkSpec(shape=(3, 4), terms=(term,)))


def test_a_tensor_of_another_shape_is_refused():
    with pytest.raises(TensorNetError, match=r"\(3, 4\).*\(4, 3\)"):
        tnc.realise(torch.ones(4, 3), NetworkSpec.dense((3, 4)))


@pytest.mark.parametrize(
    "topology", [tnc.Topology.one_core(2), tnc.Topology.two_cores(2, (0,)), tnc.Topology.train([[1], [0]])]
)
@pytest.mark.parametrize("name", ["fp32", "bf16", "int4g32z", "int8g0"])
def test_a_zero_tensor_stays_zero(topology, name):
    network = tnc.to_network(torch.zeros(6, 40), topology, ranks=2, fmt=tnc.parse_format(name))
    assert float(network.to_dense().abs().max()) < 1e-3


def test_gradients_of_the_input_are_not_recorded():
    weight = torch.ones(4, 5, requires_grad=True)
    assert not any(part.requires_grad for part in tnc.to_network(weight, ranks=1).stored.values())


@pytest.mark.parametrize("ranks", [None, 3])
def test_only_integer_cores_pay_for_error_feedback(ranks, monkeypatch):
    """The moment is factorised for integers alone, and floating point cores are rounded to nearest all the same."""
    made, moment = [], torch.eye(12, dtype=torch.float64) + 0.5
    module = import_module("tensornet_compress.decompose.realise")
    monkeypatch.setattr(module, "ErrorFeedback", lambda *given, **named: made.append(given) or ErrorFeedback(*given, **named))
    tensor, metric = random_tensor((8, 12), 0, torch.float32), KroneckerMetric(columns=moment)
    topology = tnc.Topology.one_core(2) if ranks is None else tnc.Topology.two_cores(2, (0,))
    for name, wanted in (("bf16", False), ("fp16", False), ("int4g4", True)):
        made.clear()
        fmt = tnc.parse_format(name)
        network = tnc.to_network(tensor, topology, ranks=ranks or (), fmt=fmt, metric=metric)
        again = tnc.realise(tensor, network.spec, metric, feedback=ErrorFeedback(moment))
        assert any(given[0] is moment for given in made) == wanted
        assert all(torch.equal(network.stored[part], again.stored[part]) for part in network.stored)


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
