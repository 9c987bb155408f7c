"""Models whose outputs are not those of a language model are calibrated by their heads, or by a loss of the caller's."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import tensornet_compress as tnc
from tensornet_compress.errors import TensorNetError

IDS = torch.randint(64, (4, 12), generator=torch.Generator().manual_seed(0))


class Heads(nn.Module):
    """Two heads on one trunk, of which the second takes half of it; ``form`` makes one output of both."""

    def __init__(self, form):
        super().__init__()
        torch.manual_seed(0)
        self.table, self.trunk = nn.Embedding(64, 32), nn.Linear(32, 32)
        self.first, self.second, self.form = nn.Linear(32, 6), nn.Linear(32, 3), form

    def forward(self, input_ids):
        x = torch.tanh(self.trunk(self.table(input_ids)))
        return self.form(self.first(x), self.second(x.mean(1)))


FORMS = {"dict": lambda a, b: {"a": a, "b": b}, "list": lambda a, b: [a, b], "tuple": lambda a, b: (a, b)}


def compressed(model, batches, method, **options):
    budget = tnc.Budget(bits_per_weight=8.5)
    return tnc.compress(model, budget, batches, method=method, targets=["trunk", "first", "second"], workers=1, **options)


@pytest.mark.parametrize("method", ["dense", "coded"])
@pytest.mark.parametrize("form", FORMS)
def test_heads_of_any_form_are_compressed(form, method):
    model, exact = Heads(FORMS[form]), Heads(FORMS[form])
    report = compressed(model, [IDS[:2], IDS[2:]], method)
    known, found = exact(IDS), model(IDS)
    for one, other in zip(*((x.values() if form == "dict" else x) for x in (known, found))):
        assert F.mse_loss(other, one) < 0.01 * one.square().mean()
    assert {layer.name for layer in report.layers} == {"trunk", "first", "second"}
    assert not any(layer.note for layer in report.layers)


@pytest.mark.parametrize("method", ["dense", "coded"])
def test_a_loss_takes_the_place_of_the_outputs(method):
    model = Heads(lambda a, b: {"a": a, "b": b[:1]})
    with pytest.raises(TensorNetError, match="no axis of examples in common; pass loss="):
        compressed(model, [IDS], method)
    pairs = [(IDS[:2], torch.tensor([0, 1])), (IDS[2:], torch.tensor([2, 0]))]

    def loss(model, batch):
        model.form = lambda a, b: b
        return F.cross_entropy(model(batch[0]), batch[1], reduction="sum")

    report = compressed(model, pairs, method, loss=loss)
    assert report.metric == "fisher"
    notes = {layer.name: layer.note for layer in report.layers}
    assert "middling" in notes["first"]
    assert not notes["trunk"] + notes["second"]


def test_a_loss_is_not_mixed_with_what_it_rules_out():
    with pytest.raises(TensorNetError, match="leave out by_block"):
        compressed(Heads(FORMS["list"]), [IDS], "dense", loss=lambda m, b: m(b)[0].sum(), by_block=True)


def test_question_answering_of_transformers():
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, initializer_range=0.3
    )
    torch.manual_seed(0)
    model = transformers.BertForQuestionAnswering(config).eval()
    exact = model(IDS)
    report = tnc.compress(model, tnc.Budget(bits_per_weight=6), [IDS], method="coded", workers=1)
    found = model(IDS)
    assert F.cosine_similarity(found.start_logits, exact.start_logits).min() > 0.99
    assert all(layer.error > 0 for layer in report.layers)


@pytest.mark.parametrize("scale", [1e-7, 1e7])
@pytest.mark.parametrize("method", ["dense", "auto"])
def test_weights_of_any_size_are_held(scale, method):
    """Scales in half precision would not reach them."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64, bias=False))
    model[0].weight.data = scale * torch.randn(64, 64)
    wanted = model[0].weight.detach().clone()
    report = tnc.compress(model, tnc.Budget(bits_per_weight=8.5), allocator="energy", method=method, workers=1)
    assert (model[0].weight - wanted).norm() < 0.02 * wanted.norm()
    assert abs(report.layers[0].error / float((model[0].weight - wanted).norm() / wanted.norm()) ** 2 - 1) < 0.1


def test_a_report_says_how_much_of_the_model_was_compressed():
    model = nn.ModuleDict({"one": nn.Linear(32, 32), "other": nn.Linear(32, 32), "norm": nn.LayerNorm(32)})
    report = tnc.compress(model, tnc.Budget(bits_per_weight=9), targets=["one"], allocator="energy", workers=1)
    assert report.skipped == ({"name": "other", "kind": "linear", "reason": "not matched by targets", "nbytes": 4224},)
    assert report.share == 4224 / (2 * 4224 + 256)
    assert str(report).startswith("1 layers, 48.5% of the model, at ")
