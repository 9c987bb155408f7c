"""Every replacement equals its materialised dense twin."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import tensornet_compress as tnc
from tensornet_compress.coding import CodedFormat, parse_format
from tensornet_compress.errors import TensorNetError
from tensornet_compress.nn import TNLinear, undecoded
from tensornet_compress.tensor import NetworkSpec
from tests.generators import FLOAT_FORMATS, FORMATS, FP32, SEEDS, layouts, named_topologies, random_cores, random_tensor, specs


def network_of(spec, seed=0):
    return tnc.TensorNetwork.from_cores(spec, [random_cores(term, seed + 50 * t) for t, term in enumerate(spec.terms)])


def close(found, wanted, tolerance=1e-4):
    return torch.allclose(found, wanted, atol=tolerance * max(1.0, float(wanted.abs().max())))


MATRICES = st.tuples(st.integers(1, 9), st.integers(1, 9)).flatmap(lambda shape: specs(shape, FORMATS))
BATCHES = st.sampled_from([(1,), (3,), (2, 5), (40,), (), (0,), (2, 0)])


@settings(max_examples=60)
@given(MATRICES, SEEDS, BATCHES, st.booleans())
def test_linear_layers(spec, seed, batch, with_bias):
    network = network_of(spec, seed)
    bias = random_tensor((spec.shape[0],), seed, torch.float32) if with_bias else None
    layer = tnc.TNLinear.from_network(network, bias)
    x = random_tensor((*batch, spec.shape[1]), seed, torch.float32)
    wanted = torch.nn.functional.linear(x, network.to_dense(), bias)
    assert layer(x).shape == wanted.shape
    assert torch.equal(torch.isfinite(layer(x)), torch.isfinite(wanted))
    if wanted.numel():
        assert close(layer(x), wanted)
        twin = layer.materialize()
        assert type(twin) is nn.Linear
        assert close(twin(x), wanted)


@settings(max_examples=60)
@given(MATRICES, SEEDS, st.sampled_from([(1,), (4,), (2, 3), (), (0,)]))
def test_embeddings(spec, seed, batch):
    network = network_of(spec, seed)
    layer = tnc.TNEmbedding(spec, dict(network.stored))
    indices = torch.randint(0, spec.shape[0], batch, generator=torch.Generator().manual_seed(seed))
    wanted = torch.nn.functional.embedding(indices, network.to_dense())
    assert layer(indices).shape == wanted.shape
    if wanted.numel():
        assert close(layer(indices), wanted)
        assert close(layer.materialize()(indices), wanted)
        with tnc.decoded(layer):
            assert close(layer(indices), wanted)


KERNELS = st.tuples(st.sampled_from([2, 4]), st.integers(1, 3), st.integers(1, 3), st.integers(1, 3))


@settings(max_examples=40)
@given(KERNELS.flatmap(lambda shape: specs(shape, FORMATS)), SEEDS, st.sampled_from([1, 2]), st.booleans(), st.data())
def test_convolutions(spec, seed, groups, with_bias, data):
    out, per_group, height, width = spec.shape
    conv = nn.Conv2d(
        per_group * groups,
        out,
        (height, width),
        stride=data.draw(st.sampled_from([1, (2, 1)])),
        padding=data.draw(st.sampled_from([0, (1, 2)])),
        dilation=data.draw(st.sampled_from([1, 2])),
        groups=groups,
        bias=with_bias,
    )
    network = network_of(spec, seed)
    layer = tnc.TNConv2d.from_conv2d(conv, network)
    x = random_tensor((2, per_group * groups, 8, 7), seed, torch.float32)
    with torch.no_grad():
        conv.weight.copy_(network.to_dense())
    assert close(layer(x), conv(x))
    assert close(layer(x[0]), conv(x[0]))
    assert close(layer.materialize()(x), conv(x))


@pytest.mark.parametrize("padding", ["same", "valid"])
def test_convolutions_with_named_padding_cut_in_two_cores(padding):
    conv = nn.Conv2d(3, 5, 3, padding=padding)
    network = tnc.to_network(conv.weight, tnc.Topology.two_cores(4, (0,)), ranks=5)
    x = random_tensor((2, 3, 6, 6), 1, torch.float32)
    assert close(tnc.TNConv2d.from_conv2d(conv, network)(x), conv(x))


def test_conv1d_of_gpt2():
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D(12, 8)
    with torch.no_grad():
        conv1d.bias.copy_(random_tensor((12,), 3, torch.float32))
    network = tnc.to_network(conv1d.weight.T, ranks=8)
    layer = tnc.TNLinear.from_linear(conv1d, network)
    x = random_tensor((2, 5, 8), 1, torch.float32)
    assert close(layer(x), conv1d(x))
    before = torch.get_rng_state()
    twin = layer.materialize()
    assert torch.equal(torch.get_rng_state(), before)
    assert type(twin) is type(conv1d)
    assert twin.weight.shape == conv1d.weight.shape
    assert twin.weight.is_contiguous()
    assert close(twin(x), conv1d(x))
    assert torch.equal(twin.bias, conv1d.bias)


def linear_and_network(dtype=torch.float32, fmt=FP32):
    linear = nn.Linear(12, 8).to(dtype)
    layout = tnc.Layout.of(((2, 4), (4, 3)), mode_order=(0, 2, 1, 3))
    return linear, tnc.to_network(linear.weight, tnc.Topology.train(4), layout, ranks=8, fmt=fmt)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_bias_and_dtype_are_kept_exactly(dtype):
    linear, network = linear_and_network(dtype)
    layer = tnc.TNLinear.from_linear(linear, network)
    x = random_tensor((3, 12), 1).to(dtype)
    assert torch.equal(layer.bias, linear.bias)
    assert layer.bias is not linear.bias
    assert layer.bias.dtype == dtype
    assert layer(x).dtype == dtype
    assert close(layer(x).float(), linear(x).float(), 0.05)
    assert layer.materialize().weight.dtype == dtype
    assert layer.weight.dtype == dtype


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_is_kept_both_ways(training):
    linear, network = linear_and_network()
    layer = tnc.TNLinear.from_linear(linear.train(training), network)
    assert layer.training == training
    assert layer.materialize().training == training
    table = nn.Embedding(8, 12, padding_idx=1).train(training)
    embedding = tnc.TNEmbedding.from_embedding(table, tnc.to_network(table.weight, ranks=2))
    assert embedding.training == training
    assert embedding.materialize().training == training
    assert embedding.materialize().padding_idx == 1


@pytest.mark.parametrize("fmt", ["fp32", "int4g32z"])
def test_state_dict_and_deepcopy(fmt):
    linear, network = linear_and_network(fmt=tnc.parse_format(fmt))
    layer = tnc.TNLinear.from_linear(linear, network)
    x = random_tensor((3, 12), 1, torch.float32)
    state = layer.state_dict()
    assert set(state) == {*network.stored, "bias"}
    assert all("." not in name for name in state)
    empty = tnc.TNLinear(network.spec, bias=torch.zeros(8))
    empty.load_state_dict(state)
    assert torch.equal(empty(x), layer(x))
    twin = copy.deepcopy(layer)
    assert torch.equal(twin(x), layer(x))
    with torch.no_grad():
        next(twin.parameters()).zero_()
    assert not torch.equal(twin(x), layer(x))
    assert sum(t.numel() * t.element_size() for t in state.values()) == layer.nbytes + 8 * 4


@settings(max_examples=15)
@given(layouts((4, 6)).flatmap(lambda layout: st.tuples(st.just(layout), named_topologies(len(layout.dims)))), SEEDS)
def test_gradients_equal_those_of_the_dense_layer(case, seed):
    layout, topology = case
    network = tnc.to_network(random_tensor((4, 6), seed), topology, layout, ranks=2)
    layer = tnc.TNLinear.from_network(network).double()
    x = random_tensor((3, 6), seed).requires_grad_()
    names = [name for name, _ in layer.named_parameters()]

    def contracted(x, *cores):
        return torch.func.functional_call(layer, dict(zip(names, cores)), (x,))

    assert torch.autograd.gradcheck(contracted, (x, *(p.detach().requires_grad_() for p in layer.parameters())), fast_mode=True)
    layer(x).square().sum().backward()
    by_layer, x.grad = x.grad, None
    torch.nn.functional.linear(x, layer.dense_weight(torch.float64)).square().sum().backward()
    assert torch.allclose(by_layer, x.grad)


@pytest.mark.parametrize("kind", ["linear", "embedding", "quantised"])
def test_compiles_without_graph_breaks_for_changing_batches(kind):
    torch._dynamo.reset()
    _, network = linear_and_network(fmt=tnc.parse_format("int4g32z") if kind == "quantised" else FP32)
    if kind == "embedding":
        layer = tnc.TNEmbedding(network.spec, dict(network.stored))
        inputs = [torch.randint(0, 8, (batch, 3)) for batch in (2, 3, 30)]
    else:
        layer = tnc.TNLinear.from_network(network)
        inputs = [random_tensor((batch, 12), batch, torch.float32) for batch in (2, 3, 40, 2000)]
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="eager")
    for x in inputs:
        assert torch.allclose(compiled(x), layer(x), atol=1e-6)


def test_training_through_the_ahead_of_time_compiler():
    torch._dynamo.reset()
    _, network = linear_and_network()
    layer = tnc.TNLinear.from_network(network)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    x = random_tensor((5, 12), 1, torch.float32)
    layer(x).square().sum().backward()
    wanted = [p.grad.clone() for p in layer.parameters()]
    layer.zero_grad()
    compiled(x).square().sum().backward()
    assert all(torch.allclose(p.grad, w, atol=1e-5) for p, w in zip(layer.parameters(), wanted))


def test_intermediates_stay_within_the_bound():
    _, network = linear_and_network()
    for batch in (1, 16, 128, 1024):
        layer = tnc.TNLinear(network.spec, dict(network.stored))
        assert layer._program(0, batch).largest_intermediate <= max(96, 2 * batch * 12)


def test_decoded_cores_are_held_only_inside_the_context():
    linear, network = linear_and_network(fmt=tnc.parse_format("int4g32z"))
    model = nn.Sequential(tnc.TNLinear.from_linear(linear, network))
    x = random_tensor((3, 12), 1, torch.float32)
    wanted = model(x)
    with tnc.decoded(model):
        assert torch.equal(model(x), wanted)
    with pytest.raises(RuntimeError, match="stop"), tnc.decoded(model):
        raise RuntimeError("stop")
    with torch.no_grad():
        model[0].core0_scale.zero_()
    assert not torch.equal(model(x), wanted)


def test_wrong_shapes_are_refused_with_both():
    network = tnc.to_network(torch.ones(3, 4), ranks=1)
    with pytest.raises(TensorNetError, match=r"\(4, 3\).*\(3, 4\)"):
        tnc.TNLinear.from_linear(nn.Linear(3, 4), network)
    with pytest.raises(TensorNetError, match=r"\(4, 3\).*\(3, 4\)"):
        tnc.TNEmbedding.from_embedding(nn.Embedding(4, 3), network)
    with pytest.raises(TensorNetError, match=r"\(2, 3, 1, 1\).*\(3, 4\)"):
        tnc.TNConv2d.from_conv2d(nn.Conv2d(3, 2, 1), network)
    for kind in (tnc.TNLinear, tnc.TNEmbedding):
        with pytest.raises(TensorNetError, match=r"\(2, 2, 2\)"):
            kind(NetworkSpec.dense((2, 2, 2)))
    with pytest.raises(TensorNetError, match=r"\(2, 2, 2\)"):
        tnc.TNConv2d(NetworkSpec.dense((2, 2, 2)), {})


def test_layers_that_a_network_cannot_stand_for_are_refused_when_built():
    table = nn.Embedding(4, 3, max_norm=1.0)
    with pytest.raises(TensorNetError, match=r"max_norm=1\.0"):
        tnc.TNEmbedding.from_embedding(table, tnc.to_network(torch.ones(4, 3), ranks=1))
    conv = nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect")
    with pytest.raises(TensorNetError, match="reflect"):
        tnc.TNConv2d.from_conv2d(conv, tnc.to_network(conv.weight, ranks=1))


@given(st.sampled_from([-1, 5, 7]))
def test_indices_beyond_the_table_are_refused_like_those_of_a_dense_one(index):
    layout = tnc.Layout.of(((2, 3), (4,)), shape=(5, 4))
    network = tnc.to_network(random_tensor((5, 4)), tnc.Topology.train(3), layout, ranks=2)
    layer = tnc.TNEmbedding(network.spec, dict(network.stored))
    with pytest.raises(IndexError):
        layer(torch.tensor([0, index]))


@given(FLOAT_FORMATS)
def test_bytes_follow_the_dtype_that_the_module_holds(fmt):
    _, network = linear_and_network(fmt=fmt)
    layer = tnc.TNLinear.from_network(network)
    assert layer.nbytes == network.nbytes
    assert layer.to(torch.bfloat16).nbytes == 2 * network.spec.terms[0].numbers


def test_codes_of_modules_that_are_only_saved_are_decoded_when_they_are_first_used():
    layer = torch.nn.Linear(32, 48)
    network = tnc.realise(layer.weight.detach(), NetworkSpec.dense((48, 32), CodedFormat(step=0.01)))
    wanted = TNLinear.from_linear(layer, network)
    with undecoded():
        waiting = TNLinear.from_linear(layer, network)
    assert waiting.resident_nbytes < wanted.resident_nbytes
    x = torch.randn(3, 32)
    assert torch.equal(waiting(x), wanted(x))
    assert waiting.resident_nbytes == wanted.resident_nbytes


def coded_layer(fmt):
    weight = random_tensor((12, 64), 0, torch.float32)
    return TNLinear.from_network(
        tnc.to_network(weight, tnc.Topology.one_core(2), ranks=1, fmt=parse_format(fmt) if isinstance(fmt, str) else fmt)
    )


def cast_forth_and_back(layer):
    return layer.half().bfloat16().float()


def other_codes(layer):
    layer._buffers["core0_q"] = layer._buffers["core0_q"].flip(0)
    return layer


def other_codes_in_place(layer):
    layer.core0_q.copy_(layer.core0_q.flip(0))
    return layer


def other_scales(layer):
    layer.core0_scale.data = layer.core0_scale.data * 2
    return layer


def other_state(layer):
    layer.load_state_dict({name: part.flip(0).clone() for name, part in layer.state_dict().items()}, assign=True)
    return layer


def shared(layer):
    other = coded_layer("int4g32z")
    other_codes_in_place(other)
    return layer.share_network(other)


CHANGES = (cast_forth_and_back, other_codes, other_codes_in_place, other_scales, other_state, shared, copy.deepcopy)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("rows", [1, 40])
def test_products_follow_their_codes_wherever_these_go(change, rows):
    x = random_tensor((rows, 64), 1, torch.float32)
    with torch.no_grad():
        layer = coded_layer("int4g32z")
        layer(x)
        changed = change(layer)
        wanted = torch.nn.functional.linear(x, changed.weight)
        assert torch.allclose(changed(x), wanted, atol=1e-3)
        assert torch.allclose(changed(x), wanted, atol=1e-3)


def test_products_follow_codes_that_are_decoded_anew():
    x, weight = random_tensor((1, 64), 1, torch.float32), random_tensor((12, 64), 0, torch.float32)
    layer, fmt = coded_layer(CodedFormat(step=0.5)), CodedFormat(step=0.5)
    with torch.no_grad():
        for turned in (weight, weight.flip(0), weight.flip(1), weight):
            layer._buffers["core0_coded"] = fmt.encode(turned)["_coded"]
            layer._make_resident()
            assert torch.allclose(layer(x), torch.nn.functional.linear(x, layer.weight), atol=1e-4)


def test_what_is_kept_for_products_is_not_copied_or_pickled():
    layer = coded_layer("int4g32z")
    with torch.no_grad():
        layer(random_tensor((1, 64), 1, torch.float32))
    assert layer._loops
    assert not copy.deepcopy(layer)._loops
    assert not layer.__getstate__()["_loops"]


@pytest.mark.parametrize("rows", [1, 40])
def test_inputs_of_another_width_are_refused(rows):
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"\(12, 64\)"):
        coded_layer("int4g32z")(torch.zeros(rows, 32))
