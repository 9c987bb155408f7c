"""Trains and trees: quasi-optimality, tolerances, bytes, and closed forms."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tensornet_compress as tnc
from tensornet_compress.decompose import bond_spectra, decompose_tree, feasible_ranks, tails, unfolding
from tensornet_compress.errors import TensorNetError
from tensornet_compress.tensor import TermSpec, contract_term
from tests.generators import FORMATS, FP32, SEEDS, decaying_tensor, layouts, named_topologies, random_tensor


@st.composite
def problems(draw, max_positions=4):
    """A layout of a random tensor, a topology over its positions, and ranks that it can have."""
    shape = tuple(draw(st.lists(st.integers(2, 6), min_size=1, max_size=3)))
    layout = draw(layouts(shape))
    topology = draw(named_topologies(len(layout.dims)))
    ranks = feasible_ranks([draw(st.integers(1, 6)) for _ in topology.edges], layout, topology)
    return layout, topology, ranks, random_tensor(shape, draw(SEEDS))


def rebuilt(layout, topology, cores, ranks):
    term = TermSpec(layout=layout, topology=topology, ranks=ranks, formats=(FP32,) * len(topology.legs))
    return contract_term(term, cores)


@given(problems())
def test_the_error_lies_between_the_largest_tail_and_the_root_of_their_sum(problem):
    layout, topology, ranks, tensor = problem
    laid_out = layout.apply(tensor)
    cores, used = decompose_tree(laid_out, topology, ranks)
    dropped = [float(tails(s)[rank]) for s, rank in zip(bond_spectra(laid_out, topology), used)]
    error = float((layout.invert(laid_out) - rebuilt(layout, topology, cores, used)).norm())
    # Padding is part of what is decomposed, but not of what is compared.
    slack = 1e-6 * float(tensor.norm())
    if layout.tensorization.padding == 0:
        assert error >= math.sqrt(max(dropped, default=0.0)) - slack
    assert error <= math.sqrt(sum(dropped)) + slack


@given(problems())
def test_full_ranks_are_exact(problem):
    layout, topology, _, tensor = problem
    ranks = feasible_ranks([10**6] * len(topology.edges), layout, topology)
    laid_out = layout.apply(tensor)
    cores, used = decompose_tree(laid_out, topology, ranks)
    assert torch.allclose(rebuilt(layout, topology, cores, used), tensor, atol=1e-9)


@given(problems())
def test_spectra_are_those_of_the_unfoldings(problem):
    layout, topology, _, tensor = problem
    laid_out = layout.apply(tensor)
    for bond, spectrum in enumerate(bond_spectra(laid_out, topology)):
        matrix = unfolding(laid_out, topology.side(bond))
        assert torch.allclose(spectrum, torch.linalg.svdvals(matrix), atol=1e-6 * float(tensor.norm()))
        dropped = tails(spectrum)
        assert float(dropped[0]) == pytest.approx(float(tensor.square().sum()), rel=1e-9)
        assert float(dropped[-1]) == 0.0
        assert (dropped.diff() <= 0).all()


@given(problems(), st.sampled_from([0.9, 0.5, 0.3, 0.1, 1e-3]))
def test_a_tolerance_is_honoured(problem, tolerance):
    layout, topology, _, tensor = problem
    network = tnc.to_network(tensor, topology, layout, max_error=tolerance)
    error = float((network.to_dense(torch.float64) - tensor).norm() / tensor.norm())
    assert error <= tolerance + 1e-6


@given(SEEDS, st.sampled_from([0.5, 0.2, 0.1]))
def test_a_looser_tolerance_never_costs_more(seed, tolerance):
    tensor = decaying_tensor((4, 5, 6), seed)
    loose, tight = (tnc.to_network(tensor, max_error=factor * tolerance) for factor in (2.0, 1.0))
    assert loose.nbytes <= tight.nbytes


@given(SEEDS, st.sampled_from([0.5, 0.2, 0.05]), st.sampled_from([random_tensor, decaying_tensor]))
def test_a_tolerance_costs_no_more_than_an_equal_share_for_each_bond(seed, tolerance, kind):
    """The textbook choice (Oseledets 2011): every bond drops at most tolerance / sqrt(bonds)."""
    tensor = kind((4, 5, 4, 3), seed)
    topology, layout = tnc.Topology.train(4), tnc.Layout.native((4, 5, 4, 3))
    allowed = tolerance**2 * float(tensor.square().sum()) / 3
    textbook = feasible_ranks(
        [max(1, int((tails(s) > allowed).sum())) for s in bond_spectra(tensor, topology)], layout, topology
    )
    wanted = TermSpec(layout=layout, topology=topology, ranks=tuple(textbook), formats=(FP32,) * 4).numbers
    assert tnc.to_network(tensor, max_error=tolerance).spec.terms[0].numbers <= 1.05 * wanted


@given(problems(), FORMATS, st.floats(1.0, 3.0))
def test_bytes_are_honoured(problem, fmt, share):
    layout, topology, _, tensor = problem
    smallest = tnc.to_network(tensor, topology, layout, ranks=1, fmt=fmt)
    allowed = int(smallest.nbytes * share)
    network = tnc.to_network(tensor, topology, layout, max_bytes=allowed, fmt=fmt)
    assert network.nbytes <= allowed


@given(problems())
def test_bytes_that_cannot_be_met_are_refused_with_what_is_needed(problem):
    layout, topology, _, tensor = problem
    needed = tnc.to_network(tensor, topology, layout, ranks=1).nbytes
    with pytest.raises(TensorNetError, match=rf"{needed - 1} bytes.*{needed} bytes"):
        tnc.to_network(tensor, topology, layout, max_bytes=needed - 1)


@given(SEEDS)
def test_more_bytes_never_hurt_much(seed):
    tensor = decaying_tensor((6, 6, 6), seed)
    errors = [
        float((tnc.to_network(tensor, max_bytes=nbytes).to_dense(torch.float64) - tensor).norm()) for nbytes in (300, 600, 1200)
    ]
    assert errors[1] <= errors[0] * 1.01
    assert errors[2] <= errors[1] * 1.01


def test_the_identity_is_cheap_only_when_row_and_column_digits_are_paired():
    """eye(64) over 8x8x8x8: a full-rank cut in native order, a single Kronecker product when digits are paired."""
    eye = torch.eye(64)
    native = tnc.Layout.of(((8, 8), (8, 8)))
    paired = tnc.Layout.of(((8, 8), (8, 8)), mode_order=(0, 2, 1, 3))
    counts = []
    for layout in (native, paired):
        network = tnc.to_network(eye, tnc.Topology.train(4), layout, max_error=1e-4)
        assert torch.allclose(network.to_dense(), eye, atol=1e-4)
        counts.append(network)
    assert counts[0].spec.terms[0].numbers == 8320
    assert counts[0].spec.terms[0].ranks == (8, 64, 8)
    assert counts[1].spec.terms[0].ranks == (8, 1, 8)
    assert counts[1].spec.terms[0].numbers == 256


def test_hidden_kronecker_products_are_found_by_two_cores():
    left, right = random_tensor((4, 5), 1), random_tensor((3, 6), 2)
    layout = tnc.Layout.of(((4, 3), (5, 6)))
    network = tnc.to_network(torch.kron(left, right), tnc.Topology.two_cores(4, (0, 2)), layout, max_error=1e-5)
    assert network.spec.terms[0].ranks == (1,)
    assert network.spec.terms[0].numbers == 20 + 18
    assert torch.allclose(network.to_dense(), torch.kron(left, right), atol=1e-5)


@given(SEEDS, st.integers(1, 3))
def test_a_tensor_of_known_ranks_is_recovered_exactly(seed, rank):
    tensor = decaying_tensor((5, 6, 4, 3), seed)
    topology = tnc.Topology.balanced_tree(range(4))
    low = tnc.to_network(tensor, topology, ranks=rank).to_dense(torch.float64)
    again = tnc.to_network(low, topology, max_error=1e-5)
    assert max(again.spec.terms[0].ranks) <= rank
    assert torch.allclose(again.to_dense(torch.float64), low, atol=1e-4 * float(low.norm()))


@pytest.mark.parametrize("limits", [{}, {"ranks": 1, "max_error": 0.1}, {"max_bytes": 10, "max_error": 0.1}])
def test_exactly_one_limit_is_asked_for(limits):
    with pytest.raises(TensorNetError, match="exactly one of ranks, max_error and max_bytes"):
        tnc.to_network(torch.ones(2, 2), **limits)


@pytest.mark.parametrize(
    ("limits", "message"), [({"ranks": 0}, "at least 1"), ({"ranks": [1, 2]}, "1 bonds"), ({"max_error": -0.1}, "-0.1")]
)
def test_impossible_limits_are_refused(limits, message):
    with pytest.raises(TensorNetError, match=message):
        tnc.to_network(torch.ones(2, 2), **limits)


def test_bad_tensors_are_refused_with_their_shape():
    with pytest.raises(TensorNetError, match=r"\(2, 0\) is empty"):
        tnc.to_network(torch.zeros(2, 0), ranks=1)
    with pytest.raises(TensorNetError, match=r"\(2, 2\) holds 1 NaN"):
        tnc.to_network(torch.tensor([[1.0, float("nan")], [0.0, 1.0]]), ranks=1)
    with pytest.raises(TensorNetError, match=r"\(3, 2\).*\(2, 3\)"):
        tnc.to_network(torch.ones(2, 3), layout=tnc.Layout.native((3, 2)), ranks=1)
    with pytest.raises(ValueError, match="core"):
        tnc.to_network(torch.tensor(1.0), ranks=1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_every_float_dtype_goes_in_and_comes_out(dtype):
    tensor = decaying_tensor((4, 5, 6), 1).to(dtype)
    network = tnc.to_network(tensor, ranks=30)
    assert network.to_dense().dtype == dtype
    assert torch.allclose(network.to_dense().float(), tensor.float(), atol=1e-2 if dtype.itemsize == 2 else 1e-5)


@given(problems())
def test_equal_input_gives_equal_bytes(problem):
    layout, topology, ranks, tensor = problem
    one, other = (tnc.to_network(tensor.clone(), topology, layout, ranks=ranks or 1) for _ in range(2))
    assert one.spec == other.spec
    assert all(torch.equal(one.stored[name], other.stored[name]) for name in one.stored)


def test_the_network_does_not_follow_the_tensor():
    tensor = torch.ones(3, 4)
    for topology in (tnc.Topology.one_core(2), tnc.Topology.two_cores(2, (0,))):
        network = tnc.to_network(tensor, topology, ranks=1)
        tensor.zero_()
        assert torch.allclose(network.to_dense(), torch.ones(3, 4))
        tensor.fill_(1.0)
