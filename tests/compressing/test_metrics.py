"""Every metric goes through the whole of ``compress``, and a plan makes the same bytes again."""

import copy

import pytest
import torch

import tensornet_compress as tnc
from tensornet_compress.calibrate.layer_metrics import calibrated_metrics, stored_metrics
from tensornet_compress.errors import TensorNetError
from tensornet_compress.files.steps import Steps
from tensornet_compress.nn.plan import PLAN_ATTRIBUTE
from tests.models import batches, tiny_bert, tiny_gpt2, tiny_llama


@pytest.mark.parametrize("metric", ["fisher", "euclidean", "diagonal", "input", "row-fisher", "kronecker"])
def test_plans_of_every_metric_make_the_same_bytes_again(metric):
    model, data = tiny_gpt2(), batches(3)
    first, second = copy.deepcopy(model), copy.deepcopy(model)
    report = tnc.compress(first, tnc.Budget(bits_per_weight=9.0), data, metric=metric, method="svd", workers=1)
    assert report.metric == metric
    assert getattr(first, PLAN_ATTRIBUTE).metric == metric
    tnc.apply_plan(second, getattr(first, PLAN_ATTRIBUTE), data, workers=1)
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values()))


@pytest.mark.parametrize("metric", ["fisher", "diagonal", "input", "row-fisher", "kronecker"])
@pytest.mark.parametrize("make", [tiny_gpt2, tiny_bert])
def test_statistics_by_block_give_the_same_bytes(metric, make):
    """The pooler of the encoder lies outside the blocks, and no gradient reaches it."""
    model, data = make(), batches(3)
    first, second = copy.deepcopy(model), copy.deepcopy(model)
    options = {"metric": metric, "method": "svd", "workers": 1, "targets": ["re:."]}
    reports = [
        tnc.compress(other, tnc.Budget(bits_per_weight=9.0), data, by_block=by_block, **options)
        for other, by_block in ((first, False), (second, True))
    ]
    assert reports[0].layers == reports[1].layers
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values()))


@pytest.mark.parametrize("metric", ["row-fisher", "kronecker"])
@pytest.mark.parametrize("calibrate", ["one pass", "by block"])
def test_layers_whose_gradient_is_zero_take_the_input_metric(metric, calibrate, tmp_path):
    """A residual branch that ends in zeros, as some are initialised: nothing before its last layer matters."""
    model, data = tiny_llama(), batches(2)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.zero_()
    chosen, _ = tnc.nn.find_targets(model)
    if calibrate == "one pass":
        found = calibrated_metrics(model, data, chosen, metric)
    else:
        found = {
            name: stored.load()
            for name, stored in stored_metrics(model, data, chosen, metric, Steps(tmp_path, lasting=False)).items()
        }
    inputs = calibrated_metrics(model, data, chosen, "input")
    for name in ("model.layers.1.mlp.up_proj", "model.layers.1.mlp.gate_proj"):
        assert found[name].rows is None
        torch.testing.assert_close(found[name].columns, inputs[name].columns, rtol=1e-5, atol=1e-8)
    assert found["model.layers.1.mlp.down_proj"].rows is not None


def test_metrics_choose_different_networks():
    model, data = tiny_llama(layers=1), batches(3)
    weights = []
    for metric in ("euclidean", "input", "row-fisher", "kronecker"):
        other = copy.deepcopy(model)
        options = {"method": "svd", "formats": ["bf16"], "allocator": "uniform", "workers": 1}
        tnc.compress(other, tnc.Budget(bits_per_weight=8.0), data, metric=metric, **options)
        weights.append(other.model.layers[0].mlp.up_proj.weight.detach())
    assert all(not torch.allclose(a, b, atol=1e-4) for i, a in enumerate(weights) for b in weights[:i])


def test_metrics_that_do_not_exist_or_have_no_closed_form_are_refused():
    for metric, message in (("hessian", "hessian"), ("elementwise", "closed-form")):
        with pytest.raises(TensorNetError, match=message):
            tnc.compress(tiny_llama(layers=1), tnc.Budget(bits_per_weight=8.0), batches(1), metric=metric, workers=1)


def test_a_model_of_zeros_is_refused_with_a_hint() -> None:
    model = tiny_llama()
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)
    with pytest.raises(TensorNetError, match="as where all weights are zero"):
        tnc.compress(model, tnc.Budget(bits_per_weight=4.5), [torch.randint(64, (1, 16)) for _ in range(2)], workers=1)
