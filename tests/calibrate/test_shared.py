"""Layers called several times, and weights with several users: statistics of all calls together."""

import pytest
import torch
from torch import nn

import tensornet_compress as tnc
from tensornet_compress.calibrate import collect_statistics
from tensornet_compress.calibrate.layer_metrics import calibrated_metrics, stored_metrics
from tensornet_compress.files.steps import Steps
from tests.models import VOCABULARY, batches

KINDS = ["diagonal", "input", "row-fisher", "elementwise", "kronecker"]


class Unrolled(nn.Module):
    """One layer called three times, the calls' sum, and a call that nothing reads."""

    def __init__(self, shared=True):
        super().__init__()
        torch.manual_seed(0)
        first, self.head, self.idle = nn.Linear(6, 6), nn.Linear(6, 3), False
        self.layers = nn.ModuleList([first, first, first] if shared else [first, nn.Linear(6, 6), nn.Linear(6, 6)])
        for layer in self.layers[1:]:
            layer.weight, layer.bias = first.weight, first.bias

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x).tanh()
        if self.idle:
            self.layers[0](x)
        return self.head(x)


def loss(model, batch):
    return model(batch).logsumexp(-1).sum()


def vectors(count=20, length=16):
    return torch.randn(count, length, 6, generator=torch.Generator().manual_seed(3))


def example_squares(model, x):
    gradients = [torch.autograd.grad(loss(model, one[None]), model.layers[0].weight)[0].double() for one in x]
    lengths = torch.stack([gradient.norm() for gradient in gradients])
    factors = (lengths.quantile(0.95) / lengths).clamp_max(1)
    return torch.stack([(factor * gradient).square() for factor, gradient in zip(factors, gradients)]).mean(0)


@pytest.mark.parametrize("idle", [False, True])
def test_gradients_of_all_calls_make_up_those_of_an_example(idle):
    model, x = Unrolled(), vectors()
    want = example_squares(model, x).sum(1)
    model.idle = idle
    statistics = collect_statistics(model, [x[:8], x[8:]], ["layers.0"], ["row-fisher"], loss=loss)["layers.0"]
    assert statistics.examples == 20
    assert statistics.tokens == 20 * 16
    torch.testing.assert_close(statistics.metric("row-fisher").rows, want / want.mean(), rtol=1e-4, atol=1e-7)


def test_rates_count_every_call_with_a_token():
    """The divergence of a token sums over the calls; here all of them are alike."""

    class Twice(nn.Module):
        def __init__(self, calls):
            super().__init__()
            torch.manual_seed(0)
            self.calls, self.map = calls, nn.Linear(6, 4)

        def forward(self, x):
            return torch.cat([self.map(x) for _ in range(self.calls)], -1)

    x, rates = vectors(), []
    for calls in (1, 2):
        found = collect_statistics(Twice(calls), [x], ["map"], ["kronecker"], loss=lambda m, b: m(b).sin().sum())["map"]
        rates.append(found.metric("kronecker").rate)
    assert rates == [0.5, 1.0]


@pytest.mark.parametrize("kind", KINDS)
def test_modules_that_share_a_weight_count_as_calls_of_one(kind):
    x = vectors()
    once = collect_statistics(Unrolled(), [x], ["layers.0"], [kind], loss=loss)["layers.0"].metric(kind)
    tied = {"layers.0": ("layers.1", "layers.2")}
    several = collect_statistics(Unrolled(shared=False), [x], ["layers.0"], [kind], tied=tied, loss=loss)["layers.0"]
    aliased = collect_statistics(Unrolled(), [x], ["layers.0"], [kind], tied=tied, loss=loss)["layers.0"]
    for found in (several.metric(kind), aliased.metric(kind)):
        assert found.rate == once.rate
        for part in ("weights",) if kind == "elementwise" else ("rows", "columns"):
            wanted = getattr(once, part)
            assert wanted is None if getattr(found, part) is None else torch.equal(getattr(found, part), wanted)


class Tied(nn.Module):
    """Two blocks whose layers share one weight."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.blocks = nn.Embedding(VOCABULARY, 8), nn.ModuleList([nn.Sequential(nn.Linear(8, 8)) for _ in range(2)])
        self.blocks[1][0].weight = self.blocks[0][0].weight
        self.head = nn.Linear(8, 5)

    def forward(self, input_ids):
        x = self.embed(input_ids)
        for block in self.blocks:
            x = block(x).tanh()
        return self.head(x)


def test_the_input_metric_of_a_shared_weight_is_over_the_inputs_of_all_users():
    model, data = Tied(), batches(2)
    chosen, _ = tnc.nn.find_targets(model)
    metric = calibrated_metrics(model, data, chosen, "input")["blocks.0.0"]
    with torch.no_grad():
        first = torch.cat([model.embed(ids).flatten(0, 1) for ids in data])
        second = model.blocks[0](first).tanh()
    x = torch.cat([first, second]).double()
    moment = x.T @ x / len(x)
    moment += 1e-4 * moment.diagonal().mean() * torch.eye(8)
    torch.testing.assert_close(metric.columns, moment, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("kind", ["diagonal", "input", "row-fisher", "kronecker"])
def test_users_in_other_blocks_are_seen_by_block_too(kind, tmp_path):
    model, data = Tied(), batches(2)
    chosen, _ = tnc.nn.find_targets(model)
    whole = calibrated_metrics(model, data, chosen, kind)
    stored = stored_metrics(model, data, chosen, kind, Steps(tmp_path, lasting=False))
    assert set(whole) == set(stored) == {"blocks.0.0", "head"}
    alone = calibrated_metrics(model, data, [tnc.nn.Target("blocks.0.0", "linear")], kind)["blocks.0.0"]
    side = "rows" if kind == "row-fisher" else "columns"
    assert not torch.allclose(getattr(alone, side), getattr(whole["blocks.0.0"], side))
    for name, metric in whole.items():
        again = stored[name].load()
        for one, other in ((metric.rows, again.rows), (metric.columns, again.columns)):
            assert one is None if other is None else torch.allclose(one, other, rtol=1e-6)


def test_batches_that_reach_no_target_are_refused():
    class Idle(Tied):
        def forward(self, input_ids):
            return self.embed(input_ids)

    model = Idle()
    with pytest.raises(tnc.TensorNetError, match=r"'blocks\.0\.0' received no input"):
        calibrated_metrics(model, batches(1), tnc.nn.find_targets(model)[0], "input")


class Routed(nn.Module):
    """Three experts of which the second sees no token, or is not called at all."""

    def __init__(self, called):
        super().__init__()
        torch.manual_seed(0)
        self.called, self.embed, self.head = called, nn.Embedding(VOCABULARY, 8), nn.Linear(8, VOCABULARY)
        self.experts = nn.ModuleList([nn.Linear(8, 8) for _ in range(3)])

    def forward(self, input_ids):
        x = self.embed(input_ids).flatten(0, 1)
        for number, expert in enumerate(self.experts):
            chosen = (input_ids.flatten() > 200 if number == 1 else input_ids.flatten() % 2 == number // 2).nonzero()[:, 0]
            if number != 1 or self.called:
                x = x.index_add(0, chosen, expert(x[chosen]))
        return self.head(x.view(*input_ids.shape, 8))


@pytest.mark.parametrize("called", [False, True])
@pytest.mark.parametrize("kind", ["diagonal", "input", "row-fisher", "kronecker"])
def test_an_expert_that_no_token_chose_has_no_metric(kind, called, tmp_path):
    model, data = Routed(called), batches(2)
    chosen, _ = tnc.nn.find_targets(model)
    metrics = calibrated_metrics(model, data, chosen, kind)
    assert (
        set(metrics)
        == set(stored_metrics(model, data, chosen, kind, Steps(tmp_path, lasting=False)))
        == {"experts.0", "experts.2", "head"}
    )
    assert all(torch.isfinite(part).all() for m in metrics.values() for part in (m.rows, m.columns) if part is not None)


@pytest.mark.parametrize("options", [{}, {"metric": "input"}, {"metric": "kronecker"}, {"by_block": True}])
def test_an_expert_that_no_token_chose_is_compressed_like_a_middling_layer(options):
    model = Routed(called=True)
    report = tnc.compress(model, tnc.Budget(bits_per_weight=9), batches(4), method="dense", workers=1, **options)
    layers = {layer.name: layer for layer in report.layers}
    assert "never reached" in layers["experts.1"].note
    assert not layers["experts.0"].note
    assert layers["experts.1"].sensitivity > 0
    assert layers["experts.1"].nbytes >= 0.5 * layers["experts.0"].nbytes
    assert layers["experts.1"].error < 0.2
