"""Fitting behind a compressed prefix, against the least-squares problem that it solves and against fitting without it."""

import copy

import pytest
import torch
from torch import nn

import tensornet_compress as tnc
from tensornet_compress.compressing import model_nbytes
from tensornet_compress.errors import TensorNetError
from tensornet_compress.nn import NetworkModule, Target, layer_weight
from tensornet_compress.nn.plan import PLAN_ATTRIBUTE, Plan, layer_plan
from tensornet_compress.tensor import NetworkSpec
from tensornet_compress.train import BlockRefinement, Propagation, propagate
from tests.models import VOCABULARY, batches, tiny_bert, tiny_gpt2, tiny_llama


def planned(model, bits, data, **options):
    other = copy.deepcopy(model)
    tnc.compress(other, tnc.Budget(bits_per_weight=bits), data, workers=1, **options)
    return other, getattr(other, PLAN_ATTRIBUTE)


def divergence(model, other, data):
    with torch.no_grad():
        pairs = [(model(ids).logits.log_softmax(-1), other(ids).logits.log_softmax(-1)) for ids in data]
    return float(torch.stack([(p.exp() * (p - q)).sum(-1).mean() for p, q in pairs]).mean())


def test_lossless_formats_leave_the_model_as_it_was():
    """With fp32 cores nothing is lost, so there is no shift to correct and nothing to refine."""
    model, data = tiny_llama(layers=2), batches(2)
    _, plan = planned(model, 32.0, data, method="dense", formats=["fp32"])
    other = copy.deepcopy(model)
    reports = propagate(other, plan, data)
    for ids in data:
        torch.testing.assert_close(model(ids).logits, other(ids).logits, rtol=1e-4, atol=1e-5)
    assert max(report.fitted for report in reports) < 1e-10


@pytest.mark.parametrize(
    ("options", "bits"),
    [({"method": "dense", "formats": ["int3g16z"]}, 5.0), ({"method": "svd", "formats": ["bf16"]}, 10.0)],
)
def test_propagation_lowers_the_divergence_on_its_tokens(options, bits):
    model, data = tiny_llama(layers=4), batches(8, rows=8)
    alone, plan = planned(model, bits, data, **options)
    behind = copy.deepcopy(model)
    propagate(behind, plan, data, Propagation(correction=1.0))
    assert divergence(model, behind, data) < divergence(model, alone, data)
    assert model_nbytes(behind) == model_nbytes(alone)


def test_correction_is_the_least_squares_answer():
    """The second block's first layer, in a lossless format, must map the compressed inputs to the dense outputs as well as any
    matrix can."""
    model, data = tiny_llama(layers=2), batches(8, rows=8)
    _, plan = planned(model, 6.0, data, method="dense", formats=["int3g16z", "fp32"], targets=["layers.0.*", "layers.1.*"])
    name = "model.layers.1.self_attn.q_proj"
    lossless = tnc.NetworkSpec.dense(plan.layers[name].spec.shape, tnc.parse_format("fp32"))
    layers = plan.layers | {name: plan.layers[name].model_copy(update={"spec": lossless})}
    other = copy.deepcopy(model)
    propagate(other, plan.model_copy(update={"layers": layers}), data, Propagation(correction=1.0, ridge=1e-9))
    dense_in, compressed_in = inputs(model, name, data), inputs(other, name, data)
    wanted = dense_in @ layer_weight(model.get_submodule(name)).double().T
    best = torch.linalg.lstsq(compressed_in, wanted).solution
    fitted = other.get_submodule(name).weight.detach().double().T
    error, least = (compressed_in @ fitted - wanted).norm(), (compressed_in @ best - wanted).norm()
    assert float(error) == pytest.approx(float(least), rel=1e-3)
    assert float(least) < 0.95 * float((compressed_in @ layer_weight(model.get_submodule(name)).double().T - wanted).norm())


def inputs(model, name, data):
    found = []
    handle = model.get_submodule(name).register_forward_pre_hook(
        lambda _m, given: found.append(given[0].flatten(0, 1).double())
    )
    with torch.no_grad():
        for ids in data:
            model(ids)
    handle.remove()
    return torch.cat(found)


def test_refinement_lowers_each_blocks_error_and_keeps_bytes():
    model, data = tiny_llama(layers=3), batches(6, rows=4)
    alone, plan = planned(model, 5.0, data, method="dense", formats=["int3g16o"])
    other = copy.deepcopy(model)
    reports = propagate(other, plan, data, Propagation(refinement=BlockRefinement(epochs=4)))
    assert all(report.refined < report.fitted for report in reports)
    assert model_nbytes(other) == model_nbytes(alone)
    modules = [module for module in other.modules() if isinstance(module, NetworkModule)]
    assert all(part.dtype == torch.float16 for module in modules for name, part in module.named_parameters() if "scale" in name)


@pytest.mark.parametrize("ignore", [(), ("*down_proj",)])
def test_refinement_in_the_models_own_dtype(ignore):
    """A layer that stays dense takes the dtype that the norm before it gives, and no other."""
    model, data = tiny_llama().to(torch.bfloat16), batches(6, rows=4)
    _, plan = planned(model, 5.0, data, method="dense", formats=["int3g16o"], ignore=ignore)
    other = copy.deepcopy(model)
    norms = {name: part.clone() for name, part in other.named_parameters() if "norm" in name}
    reports = propagate(other, plan, data, Propagation(refinement=BlockRefinement(epochs=4)))
    assert all(report.refined < report.fitted for report in reports)
    trained = dict(other.named_parameters())
    assert all(trained[name].dtype == torch.bfloat16 for name in norms)
    assert any(not torch.equal(trained[name], part) for name, part in norms.items())


@pytest.mark.parametrize("make", [tiny_gpt2, tiny_bert])
def test_other_models_and_layers_outside_the_blocks(make):
    """BERT's pooler lies outside the blocks; GPT-2's layers are Conv1D."""
    model, data = make(), batches(3)
    alone, plan = planned(model, 12.0, data, method="dense", formats=["int8g16"])
    other = copy.deepcopy(model)
    propagate(other, plan, data, Propagation(precision="bfloat16"))
    assert model_nbytes(other) == model_nbytes(alone)
    key = "logits" if make is tiny_gpt2 else "last_hidden_state"
    torch.testing.assert_close(model(data[0])[key], other(data[0])[key], rtol=0.1, atol=0.15)


def test_a_compressed_embedding_feeds_the_blocks():
    """The first layer of the first block maps what the embedding gives now to what the dense one gave there, as well as any
    matrix can; its measured error is that of the compressed model."""
    model, data = tiny_llama(layers=1, tied=False), batches(8, rows=8)
    targets = ["model.embed_tokens", "*q_proj"]
    _, plan = planned(model, 5.0, data, method="dense", formats=["int3g16z"], targets=targets)
    name = "model.layers.0.self_attn.q_proj"
    weight = layer_weight(model.get_submodule(name))
    exact = NetworkSpec.dense(tuple(weight.shape), tnc.parse_format("fp32"), "float32")
    layers = plan.layers | {name: plan.layers[name].model_copy(update={"spec": exact})}
    other = copy.deepcopy(model)
    settings = Propagation(correction=1.0, ridge=1e-9)
    reports = propagate(other, plan.model_copy(update={"layers": layers}), data, settings)
    dense_in, compressed_in = inputs(model, name, data), inputs(other, name, data)
    wanted = dense_in @ weight.double().T
    least = (compressed_in @ torch.linalg.lstsq(compressed_in, wanted).solution - wanted).norm()
    error = (compressed_in @ other.get_submodule(name).weight.detach().double().T - wanted).norm()
    assert float(error) == pytest.approx(float(least), rel=1e-3)
    ends = [inputs(part, "model.norm", data) for part in (model, other)]
    lost = (ends[0] - ends[1]).square().sum(-1) / ends[0].square().sum(-1)
    assert reports[0].fitted == pytest.approx(float(lost.mean()), rel=1e-4)


class InPlace(nn.Module):
    """Blocks that add to their states, in place or not."""

    def __init__(self, in_place):
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 32)
        self.blocks = nn.ModuleList(InPlaceBlock(in_place) for _ in range(2))

    def forward(self, input_ids):
        x = self.embed(input_ids)
        for block in self.blocks:
            x = block(x)
        return {"last_hidden_state": x}


class InPlaceBlock(nn.Module):
    def __init__(self, in_place):
        super().__init__()
        self.in_place = in_place
        self.a, self.b = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x):
        if not self.in_place:
            x = x + self.a(x).tanh()
            return x + self.b(x).tanh()
        x += self.a(x).tanh()
        x += self.b(x).tanh()
        return x


def test_blocks_that_change_their_states_in_place_are_fitted_as_others_are():
    torch.manual_seed(0)
    models = [InPlace(in_place).eval() for in_place in (False, True)]
    models[1].load_state_dict(models[0].state_dict())
    spec, data = NetworkSpec.dense((32, 32), tnc.parse_format("int3g16z"), "float32"), batches(4, rows=8)
    targets = [Target(f"blocks.{number}.{name}", "linear") for number in range(2) for name in "ab"]
    layers = {target.name: layer_plan(target, models[0].get_submodule(target.name), spec) for target in targets}
    expected, found = (propagate(model, Plan(metric="input", layers=layers), data) for model in models)
    assert all(report.fitted > 1e-4 for report in found)
    assert [report.fitted for report in found] == [report.fitted for report in expected]
    assert [report.corrections for report in found] == [report.corrections for report in expected]
    assert [list(report.corrections) for report in found] == [["a", "b"], ["a", "b"]]
    assert all(torch.equal(a, b) for a, b in zip(*(model.state_dict().values() for model in models)))


def test_a_model_that_trains_is_fitted_without_its_dropout():
    model, data = tiny_gpt2(), batches(3)
    _, plan = planned(model, 7.0, data, method="dense", formats=["int4g32"])
    settings = Propagation(refinement=BlockRefinement())
    steady, trained = copy.deepcopy(model), copy.deepcopy(model).train()
    trained.transformer.ln_f.eval()
    random = torch.get_rng_state()
    expected, found = (propagate(other, plan, data, settings) for other in (steady, trained))
    assert [(report.fitted, report.refined) for report in found] == [(report.fitted, report.refined) for report in expected]
    assert all(torch.equal(a, b) for a, b in zip(steady.state_dict().values(), trained.state_dict().values()))
    assert torch.equal(random, torch.get_rng_state())
    assert [name for name, module in trained.named_modules() if not module.training] == ["transformer.ln_f"]


def test_bad_requests_are_refused():
    model, data = tiny_llama(layers=1), batches(1)
    _, plan = planned(model, 9.0, data, method="dense", formats=["int8g16"])
    with pytest.raises(TensorNetError, match="float7"):
        propagate(copy.deepcopy(model), plan, data, Propagation(precision="float7"))
    with pytest.raises(TensorNetError, match="lacks"):
        propagate(tiny_gpt2(), plan, data)
    with pytest.raises(TensorNetError, match="no batches"):
        propagate(copy.deepcopy(model), plan, [])
