"""Second moments of inputs against direct computation."""

import pytest
import torch
from torch import nn

from tensornet_compress.calibrate import InputMoment, collect_statistics
from tensornet_compress.errors import TensorNetError
from tests.models import VOCABULARY, batches, tiny_llama


def moments_of(model, data, names, advance=lambda: None):
    collected = collect_statistics(model, data, names, ["input"], advance=advance)
    return {name: statistics.input for name, statistics in collected.items()}


class Toy(nn.Module):
    """Two layers that share one input, and one that is fed something else; padded positions hold large values."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 6)
        self.query, self.key = nn.Linear(6, 6), nn.Linear(6, 4)
        self.last = nn.Linear(4, 3)
        self.unused = nn.Linear(4, 3)
        self.dropout = nn.Dropout(0.5)

    def forward(self, input_ids, attention_mask=None):
        x = self.dropout(self.embed(input_ids))
        if attention_mask is not None:
            x = x + 1000.0 * (1 - attention_mask[..., None])
        query, key = self.query(x), self.key(x)
        return self.last(key) + query.sum()


def direct(vectors):
    vectors = vectors.double()
    return vectors.T @ vectors / len(vectors)


def test_moments_equal_direct_computation():
    model = Toy().eval()
    ids = batches(3)
    moments = moments_of(model, ids, ["query", "last"])
    x = model.embed(torch.cat(ids)).reshape(-1, 6).detach()
    assert torch.allclose(moments["query"].mean, direct(x), rtol=1e-5)
    assert torch.allclose(moments["last"].mean, direct(model.key(x).detach()), rtol=1e-4, atol=1e-6)
    assert moments["query"].count == torch.cat(ids).numel()


def test_padding_is_left_out():
    model = Toy().eval()
    ids = batches(1, rows=3, length=5)[0]
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1], [1, 1, 0, 0, 0]])
    moments = moments_of(model, [{"input_ids": ids, "attention_mask": mask}], ["query"])
    assert moments["query"].count == 10
    assert torch.allclose(moments["query"].mean, direct(model.embed(ids[mask.bool()]).detach()), rtol=1e-5)


def test_layers_that_are_fed_one_tensor_share_one_moment():
    moments = moments_of(Toy().eval(), batches(2), ["query", "key", "last"])
    assert moments["query"] is moments["key"]
    assert moments["last"] is not moments["query"]
    assert moments["query"].count == 2 * 2 * 16


def test_a_llama_shares_moments_within_blocks_only():
    names = [f"model.layers.{i}.self_attn.{p}" for i in (0, 1) for p in ("q_proj", "k_proj", "v_proj", "o_proj")]
    moments = moments_of(tiny_llama(), batches(2), names)
    assert len({id(moment) for moment in moments.values()}) == 4
    assert moments[names[0]] is moments[names[1]] is moments[names[2]]
    alone = moments_of(tiny_llama(), batches(2), [names[6]])
    assert torch.allclose(alone[names[6]].mean, moments[names[4]].mean)


class Sometimes(Toy):
    """The second of two layers that share their input is left out for texts that begin with a small id."""

    def forward(self, input_ids, attention_mask=None):
        x = self.embed(input_ids)
        return self.query(x).sum() + (self.key(x).sum() if int(input_ids[0, 0]) > 30 else 0)


@pytest.mark.parametrize("starts", [(40, 3, 41), (3, 40, 4), (40, 41, 3)])
def test_layers_share_a_moment_only_while_they_are_given_the_same(starts):
    model, data = Sometimes().eval(), batches(3)
    for ids, start in zip(data, starts):
        ids[0, 0] = start
    moments = moments_of(model, data, ["query", "key"])
    for name, read in (("query", data), ("key", [ids for ids in data if int(ids[0, 0]) > 30])):
        torch.testing.assert_close(moments[name].mean, direct(model.embed(torch.cat(read)).reshape(-1, 6).detach()))
        assert moments[name].count == torch.cat(read).numel()


class InPlace(nn.Module):
    """A residual stream that both layers read and change in place."""

    def __init__(self):
        super().__init__()
        self.embed, self.first, self.second = nn.Embedding(VOCABULARY, 6), nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, input_ids):
        x = self.embed(input_ids)
        x += self.first(x).tanh()
        x += self.second(x).tanh()
        return x


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_tensor_changed_in_place_is_another_input(mode):
    model, ids = InPlace(), batches(2)
    with mode():
        moments = moments_of(model, ids, ["first", "second"])
        x = model.embed(torch.cat(ids)).flatten(0, 1)
        changed = x + model.first(x).tanh()
        torch.testing.assert_close(moments["first"].mean, direct(x), rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(moments["second"].mean, direct(changed), rtol=1e-5, atol=1e-7)


def hooks(model):
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())


def modes(model):
    return [module.training for module in model.modules()]


@pytest.mark.parametrize("training", [True, False])
def test_mode_and_hooks_are_left_as_found(training):
    model = Toy().train(training)
    model.dropout.train(not training)
    before = modes(model)
    moments_of(model, batches(1), ["query"])
    assert modes(model) == before
    assert hooks(model) == 0


def test_mode_and_hooks_are_left_as_found_when_the_model_fails():
    model = Toy().train()
    with pytest.raises(IndexError):
        moments_of(model, [batches(1)[0], torch.full((1, 2), VOCABULARY)], ["query", "key"])
    assert hooks(model) == 0
    assert all(modes(model))


def test_statistics_are_taken_without_dropout():
    model = Toy().train()
    ids = batches(1)
    moments = moments_of(model, ids, ["query"])
    assert torch.allclose(moments["query"].mean, direct(model.embed(ids[0]).reshape(-1, 6).detach()), rtol=1e-5)


def test_inputs_given_by_keyword_are_seen():
    class ByKeyword(Toy):
        def forward(self, input_ids, attention_mask=None):
            return self.query(input=self.embed(input_ids))

    model = ByKeyword().eval()
    ids = batches(1)
    moments = moments_of(model, ids, ["query"])
    assert torch.allclose(moments["query"].mean, direct(model.embed(ids[0]).reshape(-1, 6).detach()), rtol=1e-5)


def test_no_batches_and_no_input_are_errors():
    with pytest.raises(TensorNetError, match="no batches"):
        moments_of(Toy(), [], ["query"])
    unused = moments_of(Toy(), batches(1), ["query", "unused"])["unused"]
    for moment in (unused, InputMoment()):
        with pytest.raises(TensorNetError, match="received no input"):
            _ = moment.mean


def test_steps_are_reported():
    steps = []
    moments_of(Toy(), batches(3), ["query"], lambda: steps.append(1))
    assert len(steps) == 3
