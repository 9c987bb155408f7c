"""Networks against numpy.einsum."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from tensornet_compress.coding import unpack_permutation
from tensornet_compress.errors import TensorNetError
from tensornet_compress.tensor import FibreOrder, Layout, NetworkSpec, TensorNetwork, TermSpec, Topology, expected_tensors
from tests.generators import FP32, SEEDS, random_cores, random_tensor, specs


def random_network(spec: NetworkSpec, seed: int = 0) -> TensorNetwork:
    return TensorNetwork.from_cores(spec, [random_cores(term, seed + 50 * t) for t, term in enumerate(spec.terms)])


def by_numpy(network: TensorNetwork) -> np.ndarray:
    """Contract each term with one numpy.einsum over integer labels, then undo the layout index by index."""
    total = np.zeros(network.spec.shape)
    for t, term in enumerate(network.spec.terms):
        numbers = {label: i for i, label in enumerate(term.sizes())}
        operands: list = []
        for core, values in enumerate(network.cores(t, torch.float64)):
            operands += [values.numpy(), [numbers[label] for label in term.topology.core_labels(core)]]
        laid_out = np.einsum(*operands, [numbers[f"p{p}"] for p in range(term.topology.positions)], optimize=True)
        unordered = np.transpose(laid_out, np.argsort(term.layout.mode_order))
        padded = unordered.reshape(term.layout.tensorization.padded_shape)
        tensor = padded[tuple(slice(size) for size in term.layout.shape)]
        for order in reversed(term.layout.fibre_orders):
            tensor = np.take(tensor, np.argsort(order.permutation), axis=order.axis)
        total += tensor
    return total


@given(specs(), SEEDS)
def test_the_dense_tensor_equals_numpy_einsum(spec, seed):
    network = random_network(spec, seed)
    wanted = torch.from_numpy(by_numpy(network))
    dense = network.to_dense(torch.float64)
    assert dense.shape == spec.shape
    assert torch.allclose(dense, wanted, atol=1e-9 * max(1.0, float(wanted.abs().max())))


@given(specs())
def test_bytes_are_those_of_the_stored_tensors(spec):
    network = random_network(spec)
    stored = network.stored_tensors()
    described = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in stored.items()}
    assert described == expected_tensors(spec)
    assert network.nbytes == spec.nbytes == sum(tensor.numel() * tensor.element_size() for tensor in stored.values())


def test_a_file_of_the_stored_tensors_holds_the_bytes_and_the_network(tmp_path):
    layout = Layout.of(((2, 4), (3, 3)), fibre_orders=(FibreOrder(axis=0, permutation=(3, 1, 0, 2, 7, 6, 5, 4)),))
    term = TermSpec(layout=layout, topology=Topology.train(4), ranks=(2, 3, 2), formats=(FP32,) * 4)
    network = random_network(NetworkSpec(shape=(8, 9), terms=(term,)))
    save_file(network.stored_tensors(), tmp_path / "network.safetensors")
    loaded = load_file(tmp_path / "network.safetensors")
    assert sum(tensor.numel() * tensor.element_size() for tensor in loaded.values()) == network.nbytes
    assert unpack_permutation(loaded.pop("order0"), 8) == layout.fibre_orders[0].permutation
    assert torch.equal(TensorNetwork(network.spec, loaded).to_dense(), network.to_dense())


@given(st.integers(1, 3), SEEDS)
def test_the_sum_of_networks_is_the_sum_of_their_tensors(count, seed):
    layout = Layout.of(((2, 2), (3,)))
    networks = []
    for number in range(count):
        term = TermSpec(layout=layout, topology=Topology.train(3), ranks=(2, 2), formats=(FP32,) * 3)
        networks.append(random_network(NetworkSpec(shape=(4, 3), terms=(term,)), seed + 10 * number))
    total = TensorNetwork.sum([*networks, TensorNetwork.sum(networks)])
    wanted = 2 * sum(network.to_dense(torch.float64) for network in networks)
    assert torch.allclose(total.to_dense(torch.float64), wanted, atol=1e-5)
    assert total.nbytes == 2 * sum(network.nbytes for network in networks)


def test_networks_of_different_shapes_do_not_add():
    one, other = (random_network(NetworkSpec.dense(shape, FP32)) for shape in ((2, 3), (3, 2)))
    with pytest.raises(TensorNetError, match=r"one shape.*\(2, 3\).*\(3, 2\)"):
        TensorNetwork.sum([one, other])
    with pytest.raises(TensorNetError, match="one shape"):
        TensorNetwork.sum([])


def test_stored_parts_that_do_not_fit_are_refused():
    spec = NetworkSpec.dense((2, 3), FP32)
    with pytest.raises(TensorNetError, match=r"missing \['core0'\], unknown \['core9'\]"):
        TensorNetwork(spec, {"core9": torch.zeros(2, 3)})
    with pytest.raises(TensorNetError, match=r"'core0' has shape \(3, 2\), the spec says \(2, 3\)"):
        TensorNetwork(spec, {"core0": torch.zeros(3, 2)})
    with pytest.raises(TensorNetError, match=r"\(3, 2\).*\(2, 3\)"):
        TensorNetwork.from_cores(spec, [[torch.zeros(3, 2)]])


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16"])
def test_dense_tensors_come_back_in_the_dtype_of_the_spec(dtype):
    network = random_network(NetworkSpec.dense((3, 4), FP32, dtype))
    assert network.to_dense().dtype == getattr(torch, dtype)


def test_the_printout_shows_graph_and_ledger():
    layout = Layout.of(((2, 4), (3,)), fibre_orders=(FibreOrder(axis=0, permutation=tuple(range(8))),))
    term = TermSpec(layout=layout, topology=Topology.train(3), ranks=(2, 3), formats=(FP32,) * 3)
    network = random_network(NetworkSpec(shape=(8, 3), terms=(term,)))
    text = str(network)
    assert f"{network.nbytes:,} B" in text
    assert "ratio" in text
    for nbytes in term.core_nbytes:
        assert f"{nbytes:,} B" in text
    for (a, b), rank in zip(term.topology.edges, term.ranks):
        assert f"{a} --{rank}-- {b}" in text
    assert "order of axis 0" in text


@given(SEEDS)
def test_two_cores_on_digit_pairs_are_a_sum_of_kronecker_products(seed):
    left, right = random_tensor((3, 2, 2), seed, torch.float32), random_tensor((2, 4, 5), seed + 1, torch.float32)
    layout = Layout.of(((3, 4), (2, 5)))
    term = TermSpec(layout=layout, topology=Topology(legs=((0, 2), (1, 3)), edges=((0, 1),)), ranks=(2,), formats=(FP32, FP32))
    network = TensorNetwork.from_cores(NetworkSpec(shape=(12, 10), terms=(term,)), [[left, right]])
    wanted = sum(torch.kron(left[:, :, k], right[k]) for k in range(2))
    assert torch.allclose(network.to_dense(), wanted, atol=1e-5)
