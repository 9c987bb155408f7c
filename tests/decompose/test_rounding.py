import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tensornet_compress as tnc
from tensornet_compress.decompose import bond_spectra, decompose_tree
from tensornet_compress.errors import TensorNetError
from tensornet_compress.tensor import TermSpec, contract_term
from tests.generators import FP32, SEEDS, decaying_tensor, named_topologies, random_tensor

SHAPE = (4, 3, 5, 4)


def dense_of(cores, topology, ranks):
    layout = tnc.Layout.native(SHAPE)
    return contract_term(TermSpec(layout=layout, topology=topology, ranks=ranks, formats=(FP32,) * len(cores)), cores)


def random_tree(topology, rank, seed):
    layout = tnc.Layout.native(SHAPE)
    ranks = (rank,) * len(topology.edges)
    term = TermSpec(layout=layout, topology=topology, ranks=ranks, formats=(FP32,) * len(topology.legs))
    return [random_tensor(term.core_shape(core), seed + core) for core in range(len(topology.legs))], ranks


@given(named_topologies(4), SEEDS, st.sampled_from([0.0, 0.01, 0.1, 0.5, 0.9]), st.integers(1, 5))
def test_the_tolerance_is_honoured_on_any_tree(topology, seed, tolerance, rank):
    cores, ranks = random_tree(topology, rank, seed)
    before = dense_of(cores, topology, ranks)
    rounded, lower, spectra = tnc.round_cores(cores, topology, max_error=tolerance)
    after = dense_of(rounded, topology, lower)
    assert float((before - after).norm()) <= (tolerance + 1e-9) * float(before.norm())
    assert all(low <= high for low, high in zip(lower, ranks))
    assert len(spectra) == len(topology.edges)


@given(named_topologies(4), SEEDS, st.integers(1, 3))
def test_inflated_ranks_fall_back_to_what_the_tensor_has(topology, seed, rank):
    """Adding a network to itself doubles its ranks; rounding takes that back without changing the tensor."""
    low = tnc.to_network(random_tensor(SHAPE, seed), topology, ranks=rank)
    term = low.spec.terms[0]
    cores = low.cores(dtype=torch.float64)
    doubled = []
    for core, values in enumerate(cores):
        labels = topology.core_labels(core)
        bonds = [axis for axis, label in enumerate(labels) if label[0] == "b"]
        shape = [2 * size if axis in bonds else size for axis, size in enumerate(values.shape)]
        block = values.new_zeros(shape)
        block[tuple(slice(size) for size in values.shape)] = values
        other = tuple(slice(size, None) if axis in bonds else slice(size) for axis, size in enumerate(values.shape))
        block[other] += values if bonds else 0
        doubled.append(block)
    ranks = tuple(2 * r for r in term.ranks)
    total = dense_of(doubled, topology, ranks)
    wanted = (2 if term.ranks else 1) * dense_of(cores, topology, term.ranks)
    assert torch.allclose(total, wanted, atol=1e-9 * float(wanted.norm()))
    rounded, lower, _ = tnc.round_cores(doubled, topology, max_error=1e-7)
    assert all(after <= before for after, before in zip(lower, term.ranks))
    assert torch.allclose(dense_of(rounded, topology, lower), wanted, atol=1e-6 * float(wanted.norm()))


@given(named_topologies(4), SEEDS, st.integers(1, 3))
def test_rank_caps_hold_and_the_error_is_quasi_optimal(topology, seed, cap):
    cores, ranks = random_tree(topology, 4, seed)
    before = dense_of(cores, topology, ranks)
    rounded, lower, _ = tnc.round_cores(cores, topology, max_ranks=[cap] * len(topology.edges))
    assert all(rank <= cap for rank in lower)
    error = float((before - dense_of(rounded, topology, lower)).norm())
    best, used = decompose_tree(before, topology, [cap] * len(topology.edges))
    assert error <= max(1.0, len(lower) ** 0.5) * float((before - dense_of(best, topology, used)).norm()) + 1e-9


@given(named_topologies(4), SEEDS)
def test_spectra_met_without_truncation_are_those_of_the_dense_tensor(topology, seed):
    cores, ranks = random_tree(topology, 2, seed)
    before = dense_of(cores, topology, ranks)
    _, _, spectra = tnc.round_cores(cores, topology, max_error=0.0)
    for found, wanted in zip(spectra, bond_spectra(before, topology)):
        assert torch.allclose(found, wanted[: len(found)], atol=1e-6 * float(before.norm()))


def test_cores_given_are_left_alone():
    topology = tnc.Topology.train(4)
    cores, _ = decompose_tree(decaying_tensor(SHAPE), topology, [4, 4, 4])
    copies = [core.clone() for core in cores]
    tnc.round_cores(cores, topology, max_error=0.5)
    assert all(torch.equal(core, copy) for core, copy in zip(cores, copies))


def test_a_negative_tolerance_is_refused():
    with pytest.raises(TensorNetError, match=r"-0\.5"):
        tnc.round_cores([torch.ones(2)], tnc.Topology.one_core(1), max_error=-0.5)
