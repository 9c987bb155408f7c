"""Bond thresholds: against the matrix threshold for one bond, and the bound of tree truncation for several."""

import pytest
import torch

from tensornet_compress.coding import parse_format
from tensornet_compress.decompose import bond_spectra, decompose_tree, realise, tails
from tensornet_compress.errors import BudgetError, TensorNetError
from tensornet_compress.experimental import shrink_bonds, threshold_bonds
from tensornet_compress.experimental.bonds import unit_nbytes
from tensornet_compress.tensor import Layout, NetworkSpec, TensorNetwork, TermSpec, Topology
from tests.generators import random_tensor

FP32 = parse_format("fp32")


def network_of(tensor, layout, topology, fmt=FP32):
    cores, ranks = decompose_tree(layout.apply(tensor), topology, [1000] * len(topology.edges))
    term = TermSpec(layout=layout, topology=topology, ranks=tuple(ranks), formats=(fmt,) * len(cores))
    return TensorNetwork.from_cores(NetworkSpec(shape=tuple(tensor.shape), dtype="float64", terms=(term,)), [cores])


def decaying(shape, seed=0):
    tensor = random_tensor(shape, seed)
    for axis, size in enumerate(shape):
        scale = torch.logspace(0, -2, size, dtype=torch.float64)
        tensor = tensor * scale.reshape([-1 if i == axis else 1 for i in range(len(shape))])
    return tensor


def test_one_bond_is_the_hard_threshold_of_a_matrix():
    matrix = random_tensor((8, 6))
    network = network_of(matrix, Layout.native((8, 6)), Topology.two_cores(2, (0,)))
    values = torch.linalg.svdvals(matrix)
    multiplier = float((values[2] * values[3]) / (2 * 4 * 14))
    lowered = threshold_bonds(network, multiplier)
    assert lowered.spec.terms[0].ranks == (3,)
    u, s, vh = torch.linalg.svd(matrix)
    torch.testing.assert_close(lowered.to_dense(), (u[:, :3] * s[:3]) @ vh[:3], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("topology", [Topology.train(4), Topology.balanced_tree(range(4))])
def test_ranks_settle_and_the_error_obeys_the_tails(topology):
    tensor = decaying((4, 5, 4, 3))
    network = network_of(tensor, Layout.native(tuple(tensor.shape)), topology)
    multiplier = 1e-4
    lowered = threshold_bonds(network, multiplier)
    ranks = lowered.spec.terms[0].ranks
    assert lowered.nbytes < network.nbytes
    assert threshold_bonds(lowered, multiplier).spec.terms[0].ranks == ranks
    dropped = [float(tails(s)[rank]) for s, rank in zip(bond_spectra(tensor, topology), ranks)]
    error = float((lowered.to_dense() - tensor).square().sum())
    assert max(dropped) * (1 - 1e-4) - 1e-10 <= error <= sum(dropped) * (1 + 1e-4) + 1e-10
    term = lowered.spec.terms[0]
    for bond, spectrum in enumerate(bond_spectra(lowered.to_dense(), topology)):
        weakest = float(spectrum[ranks[bond] - 1] ** 2)
        assert weakest > 2 * multiplier * unit_nbytes(term, ranks, bond) or ranks[bond] == 1


def test_one_multiplier_spends_bytes_where_they_count():
    layout = Layout.of(((4, 4), (4, 4)), shape=(16, 16))
    networks = [network_of(decaying((16, 16), seed), layout, Topology.train(4)) for seed in (1, 2)]
    budget = sum(network.nbytes for network in networks) // 3
    even, uneven = shrink_bonds(networks, budget), shrink_bonds(networks, budget, weights=[1.0, 1e4])
    for found in (even, uneven):
        assert sum(network.nbytes for network in found) <= budget
    assert sum(network.nbytes for network in even) > 0.8 * budget
    assert uneven[1].nbytes > even[1].nbytes
    assert shrink_bonds(networks, 10**9)[0].nbytes == networks[0].nbytes


def test_bad_requests_are_refused():
    network = network_of(decaying((4, 4)), Layout.native((4, 4)), Topology.two_cores(2, (0,)))
    with pytest.raises(BudgetError, match="rank one everywhere takes 32"):
        shrink_bonds([network], 10)
    with pytest.raises(TensorNetError, match="positive weight"):
        shrink_bonds([network], 100, weights=[-1.0])
    integers = realise(random_tensor((8, 8)), NetworkSpec.dense((8, 8), parse_format("int4g8"), "float64"))
    with pytest.raises(TensorNetError, match="int4g8"):
        threshold_bonds(integers, 1.0)
