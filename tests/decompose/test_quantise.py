"""Error feedback against round to nearest, in the metric of correlated inputs."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tensornet_compress as tnc
from tensornet_compress.coding import format_nbytes, parse_format
from tensornet_compress.decompose import ErrorFeedback
from tensornet_compress.metric import KroneckerMetric, input_second_moment
from tensornet_compress.tensor import NetworkSpec
from tests.generators import SEEDS, correlated_moment, random_tensor

FORMATS = ["int2g32z", "int3g32", "int3g64z", "int4g32o", "int4g0", "int8g64"]


def metric_error(metric, weight, fmt, parts):
    return metric.norm2(weight - fmt.decode(parts, tuple(weight.shape), torch.float32))


@settings(max_examples=40)
@given(SEEDS, st.sampled_from(FORMATS), st.sampled_from([64, 96, 150]))
def test_feedback_is_never_worse_than_round_to_nearest(seed, name, run):
    weight = random_tensor((24, run), seed, torch.float32)
    moment = correlated_moment(run, seed)
    metric, fmt = KroneckerMetric(columns=moment), parse_format(name)
    fed = metric_error(metric, weight, fmt, ErrorFeedback(moment).encode(weight, fmt))
    nearest = metric_error(metric, weight, fmt, fmt.encode(weight))
    assert fed <= nearest


@settings(max_examples=10)
@given(SEEDS, st.sampled_from(FORMATS))
def test_feedback_stores_the_same_parts_of_the_same_size(seed, name):
    weight, fmt = random_tensor((6, 70), seed, torch.float32), parse_format(name)
    parts = ErrorFeedback(correlated_moment(70, seed)).encode(weight, fmt)
    assert {key: (tuple(part.shape), part.dtype) for key, part in parts.items()} == fmt.parts((6, 70))
    assert sum(part.numel() * part.element_size() for part in parts.values()) == format_nbytes(fmt, (6, 70))


@given(SEEDS, st.sampled_from(["int3g64z", "int4g64z", "int4g32o", "int5g64z", "int8g64"]))
def test_predicted_errors_are_near_measured_ones(seed, name):
    weight = random_tensor((48, 64), seed, torch.float32)
    moment = correlated_moment(64, seed)
    fmt, feedback = parse_format(name), ErrorFeedback(moment)
    decoded = fmt.decode(feedback.encode(weight, fmt), (48, 64), torch.float32)
    damped = KroneckerMetric(columns=moment + 0.01 * moment.diagonal().mean() * torch.eye(64, dtype=torch.float64))
    predicted = feedback.predicted_error(weight, fmt)
    assert predicted.shape == (48,)
    assert 1 / 1.6 <= damped.norm2(weight - decoded) / float(predicted.sum()) <= 1.6


def test_without_correlation_feedback_is_round_to_nearest_on_its_grid():
    weight = random_tensor((5, 64), 3, torch.float32)
    fmt = parse_format("int4g32")
    feedback = ErrorFeedback(torch.eye(64, dtype=torch.float64), rounds=0)
    scale, zero = fmt.fit_grid(weight, torch.ones(64))
    parts = feedback.encode(weight, fmt)
    wanted = fmt.assemble(fmt.quantise(weight, scale, zero), scale, zero)
    assert all(torch.equal(parts[name], wanted[name]) for name in wanted)


def test_a_perfectly_correlated_pair_cancels():
    """Two equal inputs see only the sum of their weights: the second takes back the error of the first."""
    moment = torch.ones(2, 2, dtype=torch.float64)
    weight = torch.tensor([[0.4, 0.4], [1.0, 0.0]])
    fmt = parse_format("int8g0")
    fed = fmt.decode(ErrorFeedback(moment, damping=1e-6).encode(weight, fmt), (2, 2), torch.float64)
    step = (weight.abs().amax(1) / 127).double()
    assert ((fed.sum(1) - weight.double().sum(1)).abs() <= step * 0.55).all()


@pytest.mark.parametrize("shape", [(4, 5, 6), (4, 30)])
def test_cores_whose_groups_do_not_run_along_the_inputs_are_rounded_to_nearest(shape):
    core = random_tensor(shape, 1, torch.float32)
    fmt = parse_format("int4g64")
    feedback = ErrorFeedback(correlated_moment(shape[-1], 1))
    assert not feedback.applies(core, fmt)
    parts, nearest = feedback.encode(core, fmt), fmt.encode(core)
    assert all(torch.equal(parts[name], nearest[name]) for name in nearest)


@pytest.mark.parametrize("name", ["fp32", "bf16", "fp16"])
def test_floats_are_rounded_to_nearest(name):
    core = random_tensor((4, 8), 1, torch.float32)
    fmt = parse_format(name)
    assert torch.equal(ErrorFeedback(torch.eye(8)).encode(core, fmt)[""], fmt.encode(core)[""])


def test_a_dead_input_does_no_harm():
    moment = correlated_moment(64, 2)
    moment[5], moment[:, 5] = 0.0, 0.0
    weight = random_tensor((8, 64), 2, torch.float32)
    fmt = parse_format("int4g64z")
    decoded = fmt.decode(ErrorFeedback(moment).encode(weight, fmt), (8, 64), torch.float32)
    assert torch.isfinite(decoded).all()
    assert float((decoded - weight)[:, 5].abs().max()) < 1.0


@settings(max_examples=10)
@given(SEEDS, st.sampled_from(["int3g32z", "int4g32z"]))
def test_dense_networks_in_a_metric_use_feedback(seed, name):
    weight = random_tensor((16, 64), seed, torch.float32)
    metric = input_second_moment(correlated_moment(64, seed))
    spec = NetworkSpec.dense((16, 64), parse_format(name))
    aware, blind = tnc.realise(weight, spec, metric), tnc.realise(weight, spec)
    assert aware.nbytes == blind.nbytes
    assert metric.norm2(weight - aware.to_dense()) < metric.norm2(weight - blind.to_dense())


@settings(max_examples=10)
@given(SEEDS, st.sampled_from(["int4g32z", "int8g64"]))
def test_integer_pairs_of_cores_lose_less_than_cores_rounded_apart(seed, name):
    """The left core is fitted to the rounded right one, and each is rounded in the metric that it is left with."""
    weight = random_tensor((40, 64), seed, torch.float32)
    metric = input_second_moment(correlated_moment(64, seed))
    fmt = parse_format(name)
    exact = tnc.to_network(weight, ranks=32, metric=metric)
    rounded = exact.spec.terms[0].model_copy(update={"formats": (fmt, fmt)})
    apart = tnc.TensorNetwork.from_cores(NetworkSpec.of(rounded), [exact.cores()])
    together = tnc.to_network(weight, ranks=32, metric=metric, fmt=fmt)
    assert together.nbytes == apart.nbytes
    assert metric.norm2(weight - together.to_dense()) < metric.norm2(weight - apart.to_dense())


@settings(max_examples=8)
@given(SEEDS)
def test_integer_trains_are_refitted_after_each_core(seed):
    weight = random_tensor((16, 16), seed, torch.float32)
    layout = tnc.Layout.of(((4, 4), (4, 4)))
    topology, fmt = tnc.Topology.train(4), parse_format("int4g64z")
    refitted, once = (tnc.to_network(weight, topology, layout, ranks=4, fmt=fmt, sweeps=sweeps) for sweeps in (1, 0))
    errors = [float((weight - network.to_dense()).norm()) for network in (refitted, once)]
    assert refitted.nbytes == once.nbytes
    assert errors[0] <= errors[1] * 1.001


@given(SEEDS, st.sampled_from(["int4g32o", "int4g32z", "int8g32"]))
def test_rows_of_a_checkpoint_that_was_quantised_before_cost_nothing(seed, name):
    fmt, moment = parse_format(name), correlated_moment(96, seed)
    weight = random_tensor((8, 96), seed, torch.float32)
    weight[:, ::32], weight[:, 1::32] = 4.0, -4.0  # Every group holds both ends of its grid, so that the grid is found again.
    weight = fmt.decode(fmt.encode(weight), (8, 96), torch.float32)
    feedback = ErrorFeedback(moment)
    if not torch.equal(fmt.decode(feedback.encode(weight, fmt), (8, 96), torch.float32), weight):
        return  # The search over clipping has found another grid.
    assert torch.equal(feedback.predicted_error(weight, fmt), torch.zeros(8, dtype=torch.float64))
    weight[3] += 0.3 * random_tensor((96,), seed, torch.float32)
    predicted = feedback.predicted_error(weight, fmt)
    assert predicted[3] > 0
    assert float(predicted.sum()) == float(predicted[3])
