"""Trains at fixed ranks against tensorly, teneva and quimb, in float64."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensorly.decomposition import tensor_train

import tensornet_compress as tnc
from tensornet_compress.decompose import decompose_tree
from tensornet_compress.decompose.linalg import truncated
from tensornet_compress.decompose.tensorly_adapter import tensorly_backend, tensorly_left_alone, train_cores
from tensornet_compress.tensor import TensorNetwork, TermSpec, contract_term
from tests.generators import FP32, SEEDS, random_tensor

SHAPES = st.lists(st.integers(2, 5), min_size=2, max_size=4).map(tuple)


def dense_of(cores, topology, ranks, shape):
    term = TermSpec(layout=tnc.Layout.native(shape), topology=topology, ranks=ranks, formats=(FP32,) * len(topology.legs))
    return contract_term(term, cores)


def own_train(tensor, rank):
    topology = tnc.Topology.train(tensor.ndim)
    cores, ranks = decompose_tree(tensor, topology, [rank] * len(topology.edges))
    return dense_of(cores, topology, ranks, tuple(tensor.shape)), ranks


@given(SHAPES, SEEDS, st.integers(1, 4))
def test_trains_agree_with_tensorly(shape, seed, rank):
    tensorly = pytest.importorskip("tensorly")
    tensor = random_tensor(shape, seed)
    dense, ranks = own_train(tensor, rank)
    theirs = tensorly.decomposition.tensor_train(tensor.numpy(), [1, *[rank] * (len(shape) - 1), 1])
    assert np.allclose(dense.numpy(), theirs.to_tensor(), atol=1e-8)
    assert tuple(theirs.rank[1:-1]) == tuple(ranks)


@given(SHAPES, SEEDS, st.integers(1, 4), st.sampled_from([torch.float32, torch.float64]))
def test_cores_of_trains_are_those_of_tensorly_with_our_svd(shape, seed, rank, dtype):
    tensor = random_tensor(shape, seed).to(dtype)
    ranks = [rank] * (len(shape) - 1)

    def solve(matrix, n_eigenvecs=None, **_):
        return truncated(matrix, n_eigenvecs)

    with tensorly_backend():
        theirs = tensor_train(tensor, [1, *ranks, 1], svd=solve).factors
    ours = train_cores(tensor, ranks)
    assert len(ours) == len(theirs)
    assert all(torch.equal(mine, its) for mine, its in zip(ours, theirs))


@given(SHAPES, SEEDS, st.integers(1, 4))
def test_trains_agree_with_teneva(shape, seed, rank):
    teneva = pytest.importorskip("teneva")
    tensor = random_tensor(shape, seed)
    # teneva truncates an orthogonalised train from the right, so it is given the axes in reverse.
    exact = teneva.svd(tensor.permute(*range(tensor.ndim)[::-1]).numpy(), e=1e-14)
    theirs = teneva.full(teneva.truncate(exact, e=1e-14, r=rank)).transpose()
    assert np.allclose(own_train(tensor, rank)[0].numpy(), theirs, atol=1e-8)


@given(SHAPES, SEEDS, st.integers(1, 4))
def test_trains_agree_with_quimb(shape, seed, rank):
    tensor_module = pytest.importorskip("quimb.tensor")
    tensor = random_tensor(shape, seed)
    theirs = tensor_module.MatrixProductState.from_dense(tensor.numpy(), dims=shape, max_bond=rank, cutoff=0.0)
    assert np.allclose(own_train(tensor, rank)[0].numpy(), theirs.to_dense().reshape(shape), atol=1e-8)


def test_a_tt_matrix_agrees_with_tensorly():
    """TT-matrix: pairs of (row digit, column digit) on each core."""
    tensorly = pytest.importorskip("tensorly")
    matrix = random_tensor((12, 20), 3)
    layout = tnc.Layout.of(((3, 4), (4, 5)))
    topology = tnc.Topology.train([(0, 2), (1, 3)])
    cores, ranks = decompose_tree(layout.apply(matrix), topology, [3])
    term = TermSpec(layout=layout, topology=topology, ranks=ranks, formats=(FP32, FP32))
    own = contract_term(term, cores)
    theirs = tensorly.decomposition.tensor_train_matrix(matrix.numpy().reshape(3, 4, 4, 5), [1, 3, 1])
    assert np.allclose(own.numpy(), tensorly.tt_matrix_to_matrix(theirs), atol=1e-8)


def test_a_tree_agrees_with_quimb_splits():
    """The tree ((0 1) (2 3)), centre in the middle: leaves, then the cut, by quimb's truncated splits."""
    tensor_module = pytest.importorskip("quimb.tensor")
    tensor = random_tensor((4, 4, 4, 4), 5)
    topology = tnc.Topology.tree(((0, 1), (2, 3)))
    ranks = [0] * len(topology.edges)
    for bond in range(len(ranks)):
        ranks[bond] = 4 if len(topology.side(bond)) == 2 else 3
    cores, used = decompose_tree(tensor, topology, ranks)
    own = dense_of(cores, topology, used, (4, 4, 4, 4))
    assert tuple(used) == tuple(ranks)
    rest = tensor_module.Tensor(tensor.numpy(), inds=list("abcd"))
    parts = []
    for leaf in "abcd":
        left, rest = rest.split([leaf], max_bond=3, cutoff=0.0, absorb="right", get="tensors", bond_ind=f"bond_{leaf}")
        parts.append(left)
    parts += list(rest.split(["bond_a", "bond_b"], max_bond=4, cutoff=0.0, absorb="right", get="tensors"))
    theirs = tensor_module.TensorNetwork(parts).contract(output_inds=list("abcd")).data
    error, their_error = float((own - tensor).norm()), float(np.linalg.norm(theirs - tensor.numpy()))
    # Leaves may be cut one by one or in another order, which changes the result at second order only.
    assert error <= 1.1 * their_error
    assert their_error <= 1.1 * error


def test_tt_linear_layers_contract_as_tensorly_torch_does():
    """The dense weight of tensorly-torch's factorised TT-matrix equals ours from the same cores."""
    with tensorly_left_alone():
        factorized = pytest.importorskip("tltorch.factorized_tensors")
    with tensorly_backend("pytorch"):
        theirs = factorized.TensorizedTensor.new(((2, 3), (4, 2)), rank=(1, 3, 1), factorization="BlockTT").normal_(0, 1)
        matrix = theirs.to_matrix().detach()
        cores = [core.detach() for core in theirs.factors]
    layout = tnc.Layout.of(((2, 3), (4, 2)))
    topology = tnc.Topology.train([(0, 2), (1, 3)])
    term = TermSpec(layout=layout, topology=topology, ranks=(3,), formats=(FP32, FP32))
    spec = tnc.NetworkSpec(shape=(6, 8), terms=(term,))
    network = TensorNetwork.from_cores(spec, [[cores[0][0], cores[1][..., 0]]])
    assert torch.allclose(network.to_dense(), matrix, atol=1e-5)
    x = random_tensor((5, 8), 1, torch.float32)
    assert torch.allclose(tnc.TNLinear.from_network(network)(x), x @ matrix.T, atol=1e-4)
