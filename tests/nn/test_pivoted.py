"""Layers whose weight is kept by pivots equal their dense twins."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import tensornet_compress as tnc
from tensornet_compress.coding import parse_format
from tensornet_compress.decompose import realise
from tensornet_compress.tensor import Layout, NetworkSpec, TermSpec, Topology
from tests.generators import random_tensor

SHAPE, RANK = (14, 9), 5


def term(shape, rank, *names):
    formats = tuple(parse_format(name) for name in names)
    topology = Topology.two_cores(len(shape), (0,)) if len(names) == 2 else Topology.one_core(len(shape))
    return TermSpec(layout=Layout.native(shape), topology=topology, ranks=(rank,) * (len(names) - 1), formats=formats)


def network(shape=SHAPE, rank=RANK, dtype="fp32", seed=0, *more):
    terms = (term(shape, rank, f"{dtype}p", dtype), *more)
    return realise(random_tensor(shape, seed, torch.float32), NetworkSpec(shape=shape, terms=terms))


@pytest.mark.parametrize("batch", [(), (1,), (3,), (2, 4), (0,)])
@pytest.mark.parametrize("bias", [False, True])
def test_linear_layers(batch, bias):
    found, x = network(), random_tensor((*batch, 9), 1, torch.float32)
    offset = random_tensor((14,), 2, torch.float32) if bias else None
    layer = tnc.TNLinear.from_network(found, offset)
    wanted = F.linear(x, found.to_dense(), offset)
    torch.testing.assert_close(layer(x), wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer.materialize()(x), wanted, rtol=1e-5, atol=1e-5)
    with tnc.decoded(layer):
        torch.testing.assert_close(layer(x), wanted, rtol=1e-5, atol=1e-5)
    assert layer.nbytes == found.nbytes == 4 * (5 * 23 - 25) + 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_inputs_of_another_dtype(dtype):
    found, x = network(dtype="bf16"), random_tensor((6, 9), 1).to(dtype)
    layer = tnc.TNLinear.from_network(found)
    assert layer(x).dtype == dtype
    torch.testing.assert_close(layer(x).double(), F.linear(x.double(), found.to_dense().double()), rtol=2e-2, atol=5e-2)


def test_an_integer_core_and_sums_are_decoded():
    x = random_tensor((6, 9), 1, torch.float32)
    for found in (
        realise(random_tensor(SHAPE), NetworkSpec(shape=SHAPE, terms=(term(SHAPE, RANK, "fp32p", "int8g0"),))),
        network(SHAPE, 2, "fp32", 0, term(SHAPE, 0, "int4g0z")),
    ):
        layer = tnc.TNLinear.from_network(found)
        torch.testing.assert_close(layer(x), F.linear(x, found.to_dense()), rtol=1e-4, atol=1e-4)


def test_embeddings_and_convolutions():
    found = network()
    table, rows = tnc.TNEmbedding(found.spec, dict(found.stored)), torch.tensor([[0, 13], [5, 5]])
    torch.testing.assert_close(table(rows), found.to_dense()[rows])
    conv, kernel = nn.Conv2d(2, 6, 3, padding=1), network((6, 2, 3, 3), 4)
    conv.weight.data = kernel.to_dense()
    images = random_tensor((2, 2, 5, 5), 1, torch.float32)
    torch.testing.assert_close(tnc.TNConv2d.from_conv2d(conv, kernel)(images), conv(images), rtol=1e-4, atol=1e-4)


def test_state_dict_deepcopy_and_pickle():
    layer, other = tnc.TNLinear.from_network(network(seed=0)), tnc.TNLinear.from_network(network(seed=7))
    x = random_tensor((3, 9), 1, torch.float32)
    assert not torch.equal(layer.core0_pivots, other.core0_pivots)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x), layer(x))
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer(x))


def test_gradients_reach_rows_and_coefficients():
    layer, x = tnc.TNLinear.from_network(network()), random_tensor((3, 9), 1, torch.float32)
    layer(x).square().sum().backward()
    fast = [parameter.grad.clone() for parameter in layer.parameters()]
    layer.zero_grad()
    F.linear(x, layer.dense_weight(torch.float32)).square().sum().backward()
    assert len(fast) == 2
    for parameter, grad in zip(layer.parameters(), fast):
        torch.testing.assert_close(parameter.grad, grad, rtol=1e-4, atol=1e-4)


def test_compiles_without_graph_breaks():
    torch._dynamo.reset()
    layer = tnc.TNLinear.from_network(network(), random_tensor((14,), 3, torch.float32))
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="eager")
    for batch in (2, 3, 40):
        x = random_tensor((batch, 9), batch, torch.float32)
        torch.testing.assert_close(compiled(x), layer(x))
