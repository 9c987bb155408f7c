"""One block at a time against one pass over the whole model."""

import weakref

import pytest
import torch
from torch import nn

from tensornet_compress.calibrate import InputMoment, collect_statistics, statistics_by_block
from tensornet_compress.errors import TensorNetError
from tensornet_compress.metric import METRIC_KINDS
from tests.models import batches, tiny_bert, tiny_gpt2, tiny_llama

KINDS = [kind for kind in METRIC_KINDS if kind != "euclidean"]
FREE = ["diagonal", "input"]


def padded(count=3):
    data = []
    for number, ids in enumerate(batches(count)):
        mask = torch.ones_like(ids)
        mask[0, -1 - number :] = 0
        data.append({"input_ids": ids, "attention_mask": mask})
    return data


def linear_names(model, ending=""):
    kinds = ("Linear", "Conv1D")
    return [name for name, module in model.named_modules() if type(module).__name__ in kinds and name.endswith(ending)]


def same(a, b):
    for x, y in ((a.rows, b.rows), (a.columns, b.columns)) if hasattr(a, "columns") else ((a.weights, b.weights),):
        assert (x is None) == (y is None)
        if x is not None:
            torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-6 * float(x.abs().max()))
    assert (a.rate is None and b.rate is None) or a.rate == pytest.approx(b.rate, rel=1e-6)


@pytest.mark.parametrize("kinds", [KINDS, FREE], ids=["gradients", "free"])
@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2, tiny_bert])
def test_numbers_are_those_of_one_pass(make, kinds):
    model, data = make(), padded()
    names = linear_names(model)
    if make is tiny_bert:
        names = [name for name in names if "pooler" not in name]
    whole = collect_statistics(model, data, names, kinds)
    found = {}
    for part in statistics_by_block(model, data, names, kinds):
        found |= part
    assert found.keys() == whole.keys()
    for name in names:
        for kind in kinds:
            same(found[name].metric(kind), whole[name].metric(kind))


@pytest.mark.parametrize("kinds", [["kronecker"], ["input"]])
def test_only_one_block_is_held(kinds, monkeypatch):
    alive = weakref.WeakSet()
    made = InputMoment.__init__

    def noted(moment):
        made(moment)
        alive.add(moment)

    monkeypatch.setattr(InputMoment, "__init__", noted)
    model = tiny_llama(layers=4)
    counts = []
    for part in statistics_by_block(model, batches(2), linear_names(model, "proj"), kinds):
        assert len(part) == 7
        counts.append(len(alive))
        del part
    assert counts == counts[:1] * 4


def test_without_gradients_every_block_runs_once_per_batch():
    model, calls = tiny_llama(layers=4), []
    for number, block in enumerate(model.model.layers):
        block.mlp.register_forward_hook(lambda *_parts, number=number: calls.append(number))
    list(statistics_by_block(model, batches(2), linear_names(model, "proj"), FREE))
    assert calls == [0, 0, 1, 1, 2, 2, 3, 3]


def test_blocks_without_named_layers_are_crossed():
    model, data = tiny_llama(layers=4), batches(2)
    names = ["model.layers.1.mlp.up_proj", "model.layers.3.mlp.up_proj"]
    whole = collect_statistics(model, data, names, ["kronecker"])
    parts = list(statistics_by_block(model, data, names, ["kronecker"]))
    assert [list(part) for part in parts] == [names[:1], names[1:]]
    for name in names:
        same((parts[0] | parts[1])[name].metric("kronecker"), whole[name].metric("kronecker"))


def test_a_loss_of_ones_own_and_layers_outside_the_blocks():
    class Stack(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.head = nn.Linear(6, 5), nn.Linear(5, 3)
            self.blocks = nn.ModuleList([nn.Linear(5, 5) for _ in range(3)])

        def forward(self, x):
            x = self.stem(x)
            for block in self.blocks:
                x = x + block(x).tanh()
            return self.head(x)

    torch.manual_seed(0)
    model, data = Stack(), [torch.randn(4, 7, 6), torch.randn(3, 7, 6)]

    def loss(model, batch):
        return model(batch).square().sum()

    names = ["stem", "head", *(f"blocks.{i}" for i in range(3))]
    # A block that is itself the layer has no name below it: such layers count as outside.
    whole = collect_statistics(model, data, names, ["kronecker"], loss=loss)
    found = {}
    for part in statistics_by_block(model, data, names, ["kronecker"], loss=loss):
        found |= part
    for name in names:
        same(found[name].metric("kronecker"), whole[name].metric("kronecker"))


def test_the_model_is_left_as_found_even_when_the_reader_stops():
    model = tiny_llama().train()
    model.lm_head.weight.requires_grad_(False)
    flags = [parameter.requires_grad for parameter in model.parameters()]
    reader = statistics_by_block(model, batches(2), linear_names(model, "proj"), ["kronecker"])
    next(reader)
    for _ in range(2):
        assert flags == [parameter.requires_grad for parameter in model.parameters()]
        assert model.training
        assert all("forward" not in module.__dict__ and not module._forward_hooks for module in model.modules())
        reader.close()


def test_blocks_that_run_twice_are_refused():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([nn.Sequential(nn.Linear(4, 4)) for _ in range(2)])

        def forward(self, input_ids):
            x = nn.functional.one_hot(input_ids, 4).float()
            for _ in range(2):
                for layer in self.layers:
                    x = layer(x)
            return x

    ids = torch.randint(0, 4, (2, 5))
    with pytest.raises(TensorNetError, match="once per batch"):
        list(statistics_by_block(Twice(), [ids], ["layers.0.0", "layers.1.0"], ["kronecker"]))


def test_layers_that_no_gradient_reaches_are_refused_only_when_they_are_all():
    model, data = tiny_bert(), batches(1)
    found = {}
    for part in statistics_by_block(model, data, ["pooler.dense", "encoder.layer.0.output.dense"], ["kronecker"]):
        found |= {name: statistics.reached for name, statistics in part.items()}
    assert found == {"pooler.dense": False, "encoder.layer.0.output.dense": True}
    with pytest.raises(TensorNetError, match="reaches the loss"):
        list(statistics_by_block(model, data, ["pooler.dense"], ["kronecker"]))


@pytest.mark.parametrize(
    ("names", "kinds", "data", "message"),
    [
        (["model.layers.0.mlp.up_proj"], ["hessian"], None, "hessian"),
        (["model.layers.0.mlp.side"], ["input"], None, "side"),
        (["model.layers.0.mlp.up_proj"], ["input"], [], "no batches"),
    ],
)
def test_bad_requests_are_refused(names, kinds, data, message):
    with pytest.raises(TensorNetError, match=message):
        list(statistics_by_block(tiny_llama(), batches(1) if data is None else data, names, kinds))
