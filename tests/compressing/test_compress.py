"""The whole offline job on tiny models: budgets, reports, and the model that is left."""

import pytest
import torch

import tensornet_compress as tnc
from tensornet_compress.errors import BudgetError, TargetError, TensorNetError
from tensornet_compress.nn import NetworkModule
from tests.models import ConvNet, batches, tiny_bert, tiny_gpt2, tiny_llama


def held_nbytes(model):
    seen, total = set(), 0
    for tensor in model.state_dict().values():
        if tensor.data_ptr() not in seen:
            seen.add(tensor.data_ptr())
            total += tensor.numel() * tensor.element_size()
    return total


def run(model, budget=None, **options):
    options = {"calibration": batches(2), "workers": 1, "method": "dense"} | options
    return tnc.compress(model, budget or tnc.Budget(bits_per_weight=6.0), **options)


@pytest.mark.parametrize("bits", [3.0, 4.7, 6.0, 9.0, 16.0])
@pytest.mark.parametrize("allocator", ["sensitivity", "energy", "uniform"])
def test_bits_per_weight_are_never_exceeded(bits, allocator):
    model = tiny_llama(layers=1)
    report = run(model, tnc.Budget(bits_per_weight=bits), allocator=allocator)
    assert report.bits_per_weight <= bits
    assert report.targeted_nbytes <= report.allowed_nbytes
    assert report.targeted_nbytes == sum(layer.nbytes for layer in report.layers)
    assert report.nbytes == held_nbytes(model)
    if report.targeted_nbytes < 0.99 * report.allowed_nbytes:
        assert any("no better combination" in note for note in report.notes)


@pytest.mark.parametrize("share", [0.5, 0.8, 1.5])
def test_ratios_and_bytes_speak_of_the_whole_model(share):
    original = held_nbytes(tiny_llama())
    for budget in (tnc.Budget(ratio=share), tnc.Budget(nbytes=int(share * original))):
        model = tiny_llama()
        report = run(model, budget)
        assert report.original_nbytes == original
        assert report.nbytes == held_nbytes(model) <= share * original
        assert report.ratio == pytest.approx(held_nbytes(model) / original)


@pytest.mark.parametrize(("family", "bits"), [("svd", 12.0), ("tt", 12.0), ("ttm", 16.0), ("tree", 16.0), ("auto", 5.0)])
def test_every_method_keeps_its_budget_and_its_family(family, bits):
    model = tiny_llama(layers=1)
    report = run(model, tnc.Budget(bits_per_weight=bits), targets=["q_proj"], method=family)
    assert report.bits_per_weight <= bits
    families = {layer.family for layer in report.layers}
    assert families <= ({"dense", "svd", "tt", "ttm", "tree"} if family == "auto" else {family, "dense"})
    if "dense" in families and family not in ("auto", "dense"):
        assert any("stay dense" in note for note in report.notes)
    assert torch.isfinite(model(batches(1)[0]).logits).all()


def test_reported_errors_are_those_of_the_model():
    original, model = tiny_llama(layers=1), tiny_llama(layers=1)
    report = run(model, calibration=None, allocator="energy")
    for layer in report.layers:
        exact = original.get_submodule(layer.name).weight.detach()
        error = (exact - model.get_submodule(layer.name).weight.detach()).square().sum() / exact.square().sum()
        assert layer.error == pytest.approx(float(error), rel=1e-3)
        assert layer.weights == exact.numel()
    assert any("Euclidean" in note for note in report.notes)


def test_more_bytes_come_nearer_to_the_original():
    ids = batches(1, rows=4, seed=8)[0]
    with torch.no_grad():
        wanted = tiny_llama()(ids).logits.log_softmax(-1)
        divergence = []
        for bits in (3.0, 4.5, 8.5):
            model = tiny_llama()
            run(model, tnc.Budget(bits_per_weight=bits))
            divergence.append(float((wanted.exp() * (wanted - model(ids).logits.log_softmax(-1))).sum(-1).mean()))
    assert divergence[0] > divergence[1] > divergence[2]


def test_the_report_lists_every_layer_once():
    model = tiny_llama(tied=False)
    report = run(model, targets=["q_proj", "lm_head"], ignore=["layers.1.*"])
    assert [layer.name for layer in report.layers] == ["model.layers.0.self_attn.q_proj", "lm_head"]
    assert all(isinstance(model.get_submodule(layer.name), NetworkModule) for layer in report.layers)
    assert sum(isinstance(m, NetworkModule) for m in model.modules()) == 2
    assert len(report.skipped) == 16 - 2
    assert all(skip["reason"] for skip in report.skipped)
    assert tnc.CompressionReport.from_json(report.to_json()) == report
    assert f"{report.bits_per_weight:.3f}" in str(report)


def test_bias_counts_and_is_kept():
    model, original = tiny_bert(), tiny_bert()
    report = run(model, targets=["query"])
    query = model.encoder.layer[0].attention.self.query
    assert torch.equal(query.bias, original.encoder.layer[0].attention.self.query.bias)
    assert report.layers[0].nbytes == query.nbytes + 32 * 4


def test_conv1d_and_convolutions_are_compressed():
    gpt2 = tiny_gpt2()
    wanted = gpt2(batches(1)[0]).logits
    run(gpt2, tnc.Budget(bits_per_weight=9.0), targets=["c_fc"])
    assert torch.allclose(gpt2(batches(1)[0]).logits, wanted, atol=0.5)
    convolutions = ConvNet().eval()
    x = torch.randn(2, 3, 12, 12)
    wanted = convolutions(x)
    report = run(convolutions, tnc.Budget(bits_per_weight=17.0), calibration=None, allocator="energy")
    assert {layer.kind for layer in report.layers} == {"conv2d", "linear"}
    assert torch.allclose(convolutions(x), wanted, atol=0.05)


def test_a_layer_of_zeros_is_no_obstacle():
    model = tiny_llama(layers=1)
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight.zero_()
    report = run(model)
    assert report.bits_per_weight <= 6.0
    assert torch.isfinite(model(batches(1)[0]).logits).all()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"method": "cp"}, TensorNetError, "'cp'"),
        ({"allocator": "best"}, TensorNetError, "'best'"),
        ({"formats": ["int1g64"]}, TensorNetError, "int1g64"),
        ({"targets": ["nothing"]}, TargetError, "'nothing'"),
        ({"calibration": None}, TensorNetError, "needs calibration"),
        ({"calibration": []}, TensorNetError, "needs calibration"),
        ({"calibration": [torch.ones(3)]}, TensorNetError, r"input_ids"),
        ({"budget": tnc.Budget(bits_per_weight=0.01)}, BudgetError, "smallest options"),
        ({"budget": tnc.Budget(nbytes=10)}, BudgetError, "10 bytes"),
        ({"unheard_of": 1}, TypeError, "unheard_of"),
    ],
)
def test_bad_requests_are_refused_and_leave_the_model_alone(options, error, message):
    model = tiny_llama(layers=1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(error, match=message):
        run(model, **options)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_an_unknown_format_is_refused_before_calibration(monkeypatch):
    model = tiny_llama(layers=1)
    monkeypatch.setattr(model, "forward", None)
    with pytest.raises(TensorNetError, match="unknown number format 'q4_k'"):
        run(model, formats=["q4_k"])


@pytest.mark.parametrize("name", ["refine", "sensitivity"])
def test_options_of_older_versions_are_said_to_have_no_effect(name):
    with pytest.warns(DeprecationWarning, match=f"{name}=.*no effect"):
        run(tiny_llama(layers=1), **{name: 0})


def test_nothing_global_changes():
    random, threads = torch.get_rng_state(), torch.get_num_threads()
    model = tiny_llama(layers=1)
    torch.set_rng_state(random)
    run(model, targets=["q_proj"])
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.get_num_threads() == threads


def test_weights_may_be_read_from_files(llama_folder):
    """Jobs read their own tensors from safetensors; the result is the same."""
    from transformers import AutoModelForCausalLM

    states = []
    for source in (None, llama_folder):
        model = AutoModelForCausalLM.from_pretrained(llama_folder).eval()
        run(model, targets=["q_proj"], source=source)
        states.append(model.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
