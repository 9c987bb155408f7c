"""One pass against statistics made by autograd, example by example."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tensornet_compress.calibrate import collect_statistics
from tensornet_compress.errors import TensorNetError
from tensornet_compress.metric import METRIC_KINDS
from tests.models import batches, residual, tiny_bert, tiny_convnet, tiny_llama

KINDS = [kind for kind in METRIC_KINDS if kind != "euclidean"]


class Classifier(nn.Module):
    """Two layers; the first is applied to every position of a sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, x):
        return self.second(self.first(x).tanh().mean(1))


def summed_loss(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1], reduction="sum")


def data(count=24, length=8):
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(count, length, 6, generator=generator)
    return x, torch.randint(0, 3, (count,), generator=generator)


def example_gradients(model, x, y, name):
    found = []
    for i in range(len(x)):
        loss = summed_loss(model, (x[i : i + 1], y[i : i + 1]))
        found.append(torch.autograd.grad(loss, model.get_submodule(name).weight)[0].double())
    return torch.stack(found)


def clipped(gradients):
    lengths = gradients.flatten(1).norm(dim=1)
    return gradients * (lengths.quantile(0.95) / lengths).clamp_max(1)[:, None, None]


@pytest.mark.parametrize("name", ["first", "second"])
def test_row_fisher_is_that_of_clipped_per_example_gradients(name):
    model, (x, y) = Classifier(), data()
    collected = collect_statistics(model, [(x[:10], y[:10]), (x[10:], y[10:])], [name], ["row-fisher"], loss=summed_loss)
    rows = collected[name].metric("row-fisher").rows
    want = clipped(example_gradients(model, x, y, name)).square().mean(0).sum(1)
    torch.testing.assert_close(rows, want / want.mean(), rtol=1e-5, atol=1e-8)


def test_rows_are_not_those_of_batch_gradients():
    """Squares of summed gradients, as some baselines take them, are something else."""
    model, (x, y) = Classifier(), data()
    rows = collect_statistics(model, [(x, y)], ["first"], ["row-fisher"], loss=summed_loss)["first"].metric("row-fisher").rows
    batch = torch.autograd.grad(summed_loss(model, (x, y)), model.first.weight)[0].double().square().sum(1)
    assert not torch.allclose(rows, batch / batch.mean(), rtol=0.05)


def test_elementwise_weights_are_mean_squared_gradients_of_equal_examples():
    """With one example repeated nothing is clipped, and the running quantile plays no part."""
    model, (x, y) = Classifier(), data(1)
    repeated = [(x, y)] * 3
    metric = collect_statistics(model, repeated, ["first"], ["elementwise"], loss=summed_loss)["first"].metric("elementwise")
    want = example_gradients(model, x, y, "first")[0].square()
    torch.testing.assert_close(metric.weights, (want / want.mean()).clamp_min(1e-6), rtol=1e-4, atol=1e-7)


def test_kronecker_factors_are_shrunk_second_moments():
    model, (x, y) = Classifier(), data(count=6, length=16)
    metric = collect_statistics(model, [(x, y)], ["first"], ["kronecker"], loss=summed_loss)["first"].metric("kronecker")
    hidden = model.first(x)
    gradients = torch.autograd.grad(F.cross_entropy(model.second(hidden.tanh().mean(1)), y, reduction="sum"), hidden)[0]
    # The middle three quarters of positions; no length lies outside [0.1, 10] means here.
    kept = gradients[:, 2:14].flatten(0, 1).double()
    moment = kept.T @ kept / len(kept)
    want = 0.7 * moment + 0.3 * moment.diagonal().mean() * torch.eye(5, dtype=torch.float64)
    torch.testing.assert_close(metric.rows, want, rtol=1e-4, atol=1e-9)
    inputs = x.flatten(0, 1).double()
    moment = inputs.T @ inputs / len(inputs)
    want = 0.9 * moment + 0.1 * moment.diagonal().mean() * torch.eye(6, dtype=torch.float64)
    torch.testing.assert_close(metric.columns, want, rtol=1e-5, atol=1e-9)


def test_divergence_rate_predicts_the_loss_of_small_errors():
    """KL of a small random change of a layer against ``rate * norm2``: the Fisher information is the Hessian of the KL."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4))
    x = torch.randn(4000, 6)

    def sampled(model, batch):
        logits = model(batch)
        labels = torch.multinomial(logits.detach().softmax(-1), 1, generator=torch.Generator().manual_seed(1))[:, 0]
        return F.cross_entropy(logits, labels, reduction="sum")

    kinds = ["elementwise", "kronecker", "row-fisher"]
    statistics = collect_statistics(model, [x], ["0"], kinds, loss=sampled)["0"]
    change = 0.02 * torch.randn(4, 6, generator=torch.Generator().manual_seed(2))
    before = model(x).detach().log_softmax(-1)
    with torch.no_grad():
        model[0].weight += change
        divergence = float((before.exp() * (before - model(x).log_softmax(-1))).sum(-1).mean())
    for kind in kinds:
        metric = statistics.metric(kind)
        assert metric.rate * metric.norm2(change) == pytest.approx(divergence, rel=0.5), kind


def test_padding_is_left_out():
    model, ids = tiny_bert(), batches(1, rows=2, length=12)[0]
    padded = torch.cat([ids, torch.zeros(2, 4, dtype=ids.dtype)], 1)
    mask = torch.cat([torch.ones(2, 12), torch.zeros(2, 4)], 1).long()
    name = "encoder.layer.1.output.dense"

    def loss(model, batch):
        output = model(**batch).last_hidden_state
        return (output * batch["attention_mask"][..., None]).sin().sum()

    plain = collect_statistics(model, [{"input_ids": ids, "attention_mask": mask[:, :12]}], [name], KINDS, loss=loss)
    masked = collect_statistics(model, [{"input_ids": padded, "attention_mask": mask}], [name], KINDS, loss=loss)
    for kind in ("diagonal", "input", "kronecker"):
        a, b = plain[name].metric(kind), masked[name].metric(kind)
        torch.testing.assert_close(a.columns, b.columns, rtol=1e-4, atol=1e-6)
    a, b = plain[name].metric("kronecker"), masked[name].metric("kronecker")
    torch.testing.assert_close(a.rows, b.rows, rtol=1e-3, atol=1e-7)
    a, b = plain[name].metric("row-fisher"), masked[name].metric("row-fisher")
    torch.testing.assert_close(a.rows, b.rows, rtol=1e-3, atol=1e-6)


def test_language_models_and_half_precision():
    model, data = tiny_llama(), batches(2)
    names = ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"]
    exact = collect_statistics(model, data, names, KINDS)
    half = collect_statistics(model, data, names, KINDS, precision=torch.bfloat16)
    for name in names:
        a, b = exact[name].metric("kronecker"), half[name].metric("kronecker")
        torch.testing.assert_close(a.columns.float(), b.columns.float(), rtol=0.1, atol=0.05 * float(a.columns.max()))
        assert torch.isfinite(b.rows).all()


def test_convolutions_are_seen_as_matrices_of_patches():
    model = tiny_convnet()
    images = torch.randn(6, 3, 9, 9)
    names = ["stem", "wide", "head"]

    def loss(model, batch):
        return model(batch).logsumexp(-1).sum()

    statistics = collect_statistics(model, [images], names, ["row-fisher", "kronecker"], loss=loss)
    gradients = []
    for image in images:
        gradients.append(torch.autograd.grad(loss(model, image[None]), model.wide.weight)[0].flatten(1).double())
    want = clipped(torch.stack(gradients)).square().mean(0).sum(1)
    rows = statistics["wide"].metric("row-fisher").rows
    torch.testing.assert_close(rows, (want / want.mean()).clamp_min(1e-6), rtol=1e-3, atol=1e-6)


def test_the_model_is_left_as_found():
    model = tiny_llama().train()
    model.lm_head.weight.requires_grad_(False)
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    random = torch.get_rng_state()
    collect_statistics(model, batches(1), ["model.layers.0.mlp.up_proj"], KINDS)
    assert model.training
    assert flags == {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(random, torch.get_rng_state())
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("kinds", "names", "data", "message"),
    [
        (["hessian"], ["first"], data(), "hessian"),
        (["input"], ["third"], data(), "third"),
        (["input"], ["first"], None, "no batches"),
    ],
)
def test_bad_requests_are_refused(kinds, names, data, message):
    with pytest.raises(TensorNetError, match=message):
        collect_statistics(Classifier(), [] if data is None else [data], names, kinds, loss=summed_loss)


def test_a_metric_that_was_not_collected_is_refused():
    statistics = collect_statistics(Classifier(), [data()], ["first"], ["input"], loss=summed_loss)["first"]
    with pytest.raises(TensorNetError, match="not collected"):
        statistics.metric("kronecker")


@pytest.mark.parametrize("kind", ["row-fisher", "elementwise", "kronecker"])
def test_gradients_of_zeros_alone_reach_no_layer(kind):
    model = Classifier()
    with torch.no_grad():
        model.second.weight.zero_()
    statistics = collect_statistics(model, [data()], ["first", "second"], [kind], loss=summed_loss)
    assert not statistics["first"].reached
    assert statistics["second"].reached
    with pytest.raises(TensorNetError, match=f"no gradient but zeros in 24 calibration examples.*{kind}"):
        statistics["first"].metric(kind)


@pytest.mark.parametrize("kind", ["kronecker", "row-fisher"])
def test_models_that_work_in_place_give_the_same_numbers(kind):
    def net(inplace):
        torch.manual_seed(0)
        relu = nn.ReLU(inplace=inplace)
        return nn.Sequential(nn.Conv2d(3, 4, 3), relu, nn.Conv2d(4, 4, 3), relu, nn.Flatten(), nn.Linear(64, 5))

    def loss(model, batch):
        return model(batch).logsumexp(-1).sum()

    images = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    found = [collect_statistics(net(inplace), [images], ["0", "2", "5"], [kind], loss=loss) for inplace in (False, True)]
    for name in found[0]:
        plain, in_place = (statistics[name].metric(kind) for statistics in found)
        assert torch.equal(plain.rows, in_place.rows)


def test_inputs_that_are_changed_before_their_gradient_comes_are_refused_where_they_are_needed():
    def loss(model, batch):
        return model(batch).sin().sum()

    def net(in_place):
        return residual(lambda: nn.Linear(6, 6), 6, in_place=in_place)

    x = torch.randn(4, 3, 6, generator=torch.Generator().manual_seed(0))
    for kind in ("row-fisher", "elementwise"):
        with pytest.raises(TensorNetError, match=r"input of 'map'.*in place.*kronecker metric"):
            collect_statistics(net(True), [x], ["map"], [kind], loss=loss)
    plain, in_place = (collect_statistics(net(b), [x], ["map"], ["kronecker"], loss=loss)["map"] for b in (False, True))
    assert torch.equal(plain.metric("kronecker").rows, in_place.metric("kronecker").rows)
    assert torch.equal(plain.metric("kronecker").columns, in_place.metric("kronecker").columns)
