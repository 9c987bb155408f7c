import pytest
import torch
from torch import nn

import tensornet_compress as tnc
from tensornet_compress.calibrate import fisher_sensitivity, measure_sensitivity
from tensornet_compress.errors import TensorNetError
from tests.calibrate.test_batches import padded
from tests.generators import random_tensor
from tests.models import VOCABULARY, batches, residual, tiny_bert, tiny_gpt2, tiny_llama

MEASURES = [measure_sensitivity, fisher_sensitivity]


def probes_of(model, names, size=0.02, seed=0):
    """Each layer's weight with a little noise, and the squared Euclidean size of the noise."""

    def probe(name):
        weight = model.get_submodule(name).weight.detach().clone()
        noise = size * random_tensor(tuple(weight.shape), seed, torch.float32)
        return lambda: (weight + noise, float(noise.square().sum()))

    return {name: probe(name) for name in names}


LLAMA = [f"model.layers.{i}.{name}" for i in (0, 1) for name in ("self_attn.q_proj", "mlp.down_proj")]


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}, [m.training for m in model.modules()]


def hooks(model):
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())


def same(before, after):
    return before[1] == after[1] and all(torch.equal(before[0][name], after[0][name]) for name in before[0])


@pytest.mark.parametrize("measure", MEASURES)
def test_modules_of_both_modes_are_left_as_found(measure):
    model = tiny_llama().train()
    model.model.layers[0].mlp.eval()
    before = state(model)
    measure(model, batches(1), probes_of(model, LLAMA[:1]))
    assert same(before, state(model))


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_as_found(measure, training):
    model = tiny_llama().train(training)
    model.lm_head.weight.requires_grad_(False)
    before, flags = state(model), [p.requires_grad for p in model.parameters()]
    random = torch.get_rng_state()
    measure(model, batches(2), probes_of(model, LLAMA))
    assert same(before, state(model))
    assert hooks(model) == 0
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(p.grad is None for p in model.parameters())
    assert all("forward" not in m.__dict__ for m in model.modules())
    assert torch.equal(torch.get_rng_state(), random)


@pytest.mark.parametrize("measure", MEASURES)
def test_the_model_is_left_as_found_when_its_forward_fails(measure, monkeypatch):
    model = tiny_llama().train()
    before = state(model)
    calls = []

    def fails_later(*_args):
        calls.append(1)
        if len(calls) > 2:
            raise RuntimeError("out of memory")

    handle = model.lm_head.register_forward_pre_hook(fails_later)
    with pytest.raises(RuntimeError, match="out of memory"):
        measure(model, batches(4), probes_of(model, LLAMA))
    handle.remove()
    assert same(before, state(model))
    assert hooks(model) == 0
    assert all("forward" not in m.__dict__ for m in model.modules())


def test_the_probe_equals_replacing_the_weight_by_hand():
    model, ids = tiny_llama(), batches(2)
    probes = probes_of(model, LLAMA, size=0.1)
    measured = measure_sensitivity(model, ids, probes)
    for name in LLAMA:
        other = tiny_llama()
        weight, error = probes[name]()
        with torch.no_grad():
            references = [model(x).logits.log_softmax(-1) for x in ids]
            other.get_submodule(name).weight.copy_(weight)
            outputs = [other(x).logits.log_softmax(-1) for x in ids]
        kl = sum(float((p.exp() * (p - q)).sum(-1).mean()) for p, q in zip(references, outputs)) / len(ids)
        assert measured[name] == pytest.approx(kl / error, rel=1e-3)


@pytest.mark.parametrize(("build", "names"), [(tiny_llama, LLAMA), (tiny_gpt2, ["transformer.h.0.mlp.c_fc"])])
def test_one_backward_pass_comes_near_the_probes(build, names):
    model, ids = build(), batches(8, rows=4)
    probes = probes_of(model, names)
    by_probe, by_fisher = (measure(model, ids, probes) for measure in MEASURES)
    for name in names:
        assert 0.4 <= by_fisher[name] / by_probe[name] <= 2.5


def test_encoders_are_measured_by_the_angle_of_their_outputs():
    model = tiny_bert()
    probes = probes_of(model, ["encoder.layer.0.output.dense"], size=0.1)
    assert measure_sensitivity(model, batches(2), probes)["encoder.layer.0.output.dense"] > 0


@pytest.mark.parametrize("options", [{}, {"sensitivity": "probe", "refine": 0}])
def test_short_texts_behind_long_padding_calibrate_a_model(options):
    given = [padded(ids, [16, 9], 300, "left") for ids in batches(2)]
    report = tnc.compress(tiny_llama(layers=1), tnc.Budget(bits_per_weight=10), given, method="svd", workers=1, **options)
    assert all(layer.sensitivity > 0 for layer in report.layers)


def test_models_that_change_their_embeddings_in_place_have_the_same_sensitivities():
    class Positions(nn.Module):
        def __init__(self, in_place):
            super().__init__()
            torch.manual_seed(0)
            self.in_place, self.embed = in_place, nn.Embedding(VOCABULARY, 8)
            self.positions, self.map = nn.Parameter(torch.randn(16, 8)), nn.Linear(8, 6)

        def forward(self, input_ids):
            x = self.embed(input_ids)
            if self.in_place:
                x += self.positions
            else:
                x = x + self.positions
            return self.map(x)

    plain, in_place = (
        fisher_sensitivity(model, batches(2), probes_of(model, ["map", "embed"]))
        for model in (Positions(False), Positions(True))
    )
    assert plain == in_place
    assert min(plain.values()) > 0


def embedded(**options):
    return residual(lambda: nn.Embedding(VOCABULARY, 8), 8, **options)


def test_an_input_that_its_layer_is_added_to_in_place_is_refused():
    model = embedded(in_place=True)
    with pytest.raises(TensorNetError, match=r"input of 'map'.*in place.*sensitivity='probe'"):
        fisher_sensitivity(model, batches(2), probes_of(model, ["map"]))


def test_a_layer_under_two_names_counts_once():
    once = fisher_sensitivity(embedded(), batches(2), probes_of(embedded(), ["map"]))
    twice = fisher_sensitivity(embedded(alias=True), batches(2), probes_of(embedded(), ["map"]), {"map": ("alias",)})
    assert once == twice
