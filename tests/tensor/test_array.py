"""Networks as arrays: everything that can be asked of them is what the decoded array gives."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tensornet_compress as tnc
from tensornet_compress.errors import TensorNetError
from tensornet_compress.tensor import FibreOrder, TermSpec
from tensornet_compress.tensor.array import TensorArray

SHAPE = (12, 7, 10)
RADICES = ((3, 4), (2, 4), (10,))  # the second axis is padded
ORDERS = (FibreOrder(axis=0, permutation=tuple(reversed(range(12)))), FibreOrder(axis=1, permutation=(3, 1, 4, 0, 6, 5, 2)))


def network(topology, mode_order=(0, 1, 2, 3, 4), orders=(), dtype=torch.float32, rank=3, seed=0):
    torch.manual_seed(seed)
    layout = tnc.Layout.of(RADICES, shape=SHAPE, mode_order=mode_order, fibre_orders=orders)
    term = TermSpec(
        layout=layout,
        topology=topology,
        ranks=(rank,) * len(topology.edges),
        formats=(tnc.parse_format("fp32"),) * len(topology.legs),
    )
    cores = [torch.randn(term.core_shape(core)) for core in range(len(topology.legs))]
    return tnc.TensorNetwork.from_cores(tnc.NetworkSpec.of(term, dtype), [cores])


TRAIN, TREE = tnc.Topology.train(5), tnc.Topology.balanced_tree(range(5))
NETWORKS = {
    "train": network(TRAIN),
    "woven train": network(TRAIN, (2, 0, 4, 1, 3), ORDERS, seed=1),
    "tree, fp64": network(TREE, (3, 1, 0, 4, 2), ORDERS[:1], torch.float64, seed=2),
    "pairs": network(tnc.Topology.train([(0, 2), (1, 3), (4,)]), seed=3),
    "dense": tnc.to_network(torch.randn(SHAPE), ranks=None, max_error=1e-6),
    "sum": tnc.TensorNetwork.sum([network(TRAIN, seed=4), network(TREE, (2, 0, 4, 1, 3), ORDERS, seed=5)]),
}
ENDS = st.one_of(st.none(), st.integers(-14, 14))
SLICES = st.builds(slice, ENDS, ENDS, st.sampled_from((None, 1, 2, 5, -1, -3)))


def keys():
    """Of whole numbers and slices, with or without an ellipsis; or of one list and slices."""
    axis = [st.one_of(SLICES, st.integers(-size, size - 1)) for size in SHAPE]
    plain = st.tuples(*axis).flatmap(
        lambda key: st.sampled_from((key, key[:2], (..., *key[1:]), (key[0], ..., key[2]), key[0]))
    )
    chosen = st.lists(st.integers(-7, 6), max_size=9)
    return st.one_of(plain, st.tuples(SLICES, chosen, SLICES))


@pytest.mark.parametrize("name", NETWORKS)
@given(key=keys())
def test_slices_are_those_of_the_decoded_array(name, key):
    array = tnc.TensorArray(NETWORKS[name])
    dense = NETWORKS[name].to_dense().numpy()
    wanted = dense[tuple(np.asarray(k, int) if isinstance(k, list) else k for k in key) if isinstance(key, tuple) else key]
    found = array[key]
    assert found.shape == wanted.shape
    assert found.dtype == wanted.dtype
    assert np.allclose(found, wanted, atol=1e-4)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("axis", [None, 0, 1, -1, (0, 1), (2, 0)])
def test_sums_and_means(name, axis):
    array, dense = tnc.TensorArray(NETWORKS[name]), NETWORKS[name].to_dense(torch.float64).numpy()
    assert np.allclose(array.sum(axis), dense.sum(axis), atol=1e-5)
    assert np.allclose(array.mean(axis), dense.mean(axis), atol=1e-6)


@pytest.mark.parametrize("one", NETWORKS)
@pytest.mark.parametrize("two", NETWORKS)
def test_inner_products(one, two):
    a, b = (NETWORKS[name].to_dense(torch.float64).numpy() for name in (one, two))
    array = tnc.TensorArray(NETWORKS[one])
    scale = np.linalg.norm(a) * np.linalg.norm(b)
    assert abs(array.inner(tnc.TensorArray(NETWORKS[two])) - np.vdot(a, b)) < 1e-6 * scale
    assert abs(array.inner(b) - np.vdot(a, b)) < 1e-6 * scale
    assert np.isclose(array.norm(), np.linalg.norm(a))


def test_it_is_an_array_for_numpy():
    array = tnc.TensorArray(NETWORKS["woven train"])
    dense = NETWORKS["woven train"].to_dense().numpy()
    assert np.allclose(np.asarray(array), dense, atol=1e-5)
    assert np.asarray(array, dtype=np.float64).dtype == np.float64
    assert (len(array), array.ndim, array.size, array.nbytes) == (12, 3, 840, NETWORKS["woven train"].nbytes)
    assert np.allclose(array[:, np.arange(7) % 2 == 0], dense[:, ::2], atol=1e-5)
    with pytest.raises(ValueError, match="copy"):
        np.array(array, copy=False)


def test_what_it_does_not_know_is_refused():
    array = tnc.TensorArray(NETWORKS["train"])
    for key in ([[1, 2], [3, 4]], (slice(None), [1], [2]), (0, slice(None), [1]), 1.5, None):
        with pytest.raises(TensorNetError, match=r"np.asarray|3:4"):
            array[key]
    for key in (12, (0, 0, 0, 0), (..., ...), (0, -8), np.ones(5, bool)):
        with pytest.raises(IndexError):
            array[key]
    with pytest.raises(IndexError):
        array.sum(3)
    with pytest.raises(TensorNetError, match="equal shapes"):
        array.inner(np.ones(3))


def test_a_slice_of_a_large_field_takes_a_tenth_of_the_work(tmp_path):
    """Multiply-adds, which unlike times are the same on any machine."""
    from tensornet_compress.tensor import array as module

    torch.manual_seed(0)
    layout = tnc.Layout.of(((4, 4, 4), (2, 4, 4, 4), (2, 4, 4, 4)))
    topology = tnc.Topology.train(11)
    term = TermSpec(layout=layout, topology=topology, ranks=(4,) + (8,) * 9, formats=(tnc.parse_format("bf16"),) * 11)
    cores = [torch.randn(term.core_shape(core)) for core in range(11)]
    tnc.save_network(tnc.TensorNetwork.from_cores(tnc.NetworkSpec.of(term), [cores]), tmp_path / "field.tnz")
    array = tnc.open_tensor(tmp_path / "field.tnz")
    work = []
    plan = module._plan
    module._plan = lambda *a: work.append(plan(*a)) or work[-1]
    try:
        part = array[10:12, :, 3:9]
        spent = min(program.multiply_adds for program in work)
        work.clear()
        whole = np.asarray(array)
        assert spent < work[0].multiply_adds / 10
    finally:
        module._plan = plan
    assert np.allclose(part, whole[10:12, :, 3:9], rtol=1e-3, atol=1e-3 * np.abs(whole).max())


def test_functions_of_numpy_call_its_own_sums():
    dense = torch.randn(4, 6, 5, generator=torch.Generator().manual_seed(0))
    stored = TensorArray(tnc.to_network(dense, max_error=0.0))
    for function in (np.sum, np.mean):
        np.testing.assert_allclose(function(stored), function(dense.numpy()), rtol=1e-4, atol=1e-5)
        found = function(stored, axis=(0, 2), keepdims=True)
        np.testing.assert_allclose(found, function(dense.numpy(), axis=(0, 2), keepdims=True), rtol=1e-4, atol=1e-5)
        assert function(stored, axis=0, dtype=np.float32).dtype == np.float32
    with pytest.raises(TensorNetError, match="leave out"):
        stored.sum(out=np.zeros(()))
