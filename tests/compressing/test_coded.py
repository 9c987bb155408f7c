"""A model in entropy-coded integers: the budget holds, the loss is as foretold, and the folder gives the same model again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tensornet_compress as tnc
from tensornet_compress.compressing.sizes import model_nbytes
from tensornet_compress.errors import BudgetError
from tests.models import batches, tiny_bert, tiny_llama


def kl_divergence(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    p, q = p.log_softmax(-1), q.log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).mean()


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(batches(1, 2, 24)[0]).logits


@pytest.mark.parametrize("bits", [4.0, 5.5, 8.0])
def test_the_budget_holds_and_is_used(bits: float) -> None:
    model = tiny_llama()
    report = tnc.compress(model, tnc.Budget(bits_per_weight=bits), batches(), method="coded", workers=1)
    assert 0.99 * report.allowed_nbytes <= report.targeted_nbytes <= report.allowed_nbytes
    assert report.nbytes == model_nbytes(model)


def test_more_bits_lose_less() -> None:
    exact = logits(tiny_llama())
    errors = []
    for bits in (3.5, 5.5, 8.0):
        model = tiny_llama()
        tnc.compress(model, tnc.Budget(bits_per_weight=bits), batches(), method="coded", workers=1)
        errors.append(float((logits(model) - exact).square().mean() / exact.square().mean()))
    assert errors[0] > 4 * errors[1] > 16 * errors[2]


def test_saved_and_loaded_it_is_the_same_model(tmp_path: Path) -> None:
    model = tiny_llama()
    report = tnc.compress(model, tnc.Budget(bits_per_weight=4.0), batches(), method="coded", workers=1)
    tnc.save(model, tmp_path / "coded", report=report)
    again = tnc.load(tmp_path / "coded")
    assert torch.equal(logits(again), logits(model))
    assert model_nbytes(again) == report.nbytes
    # Loaded numbers replace what a module had decoded before.
    other = tnc.load(tmp_path / "coded")
    with torch.no_grad():
        for name, buffer in other.named_buffers():
            if name.endswith("_near"):
                buffer.zero_()
    assert not torch.allclose(logits(other), logits(model))
    other.load_state_dict(model.state_dict())
    assert torch.equal(logits(other), logits(model))


def test_tied_embeddings_are_compressed_and_stay_tied() -> None:
    model = tiny_llama(tied=True)
    report = tnc.compress(model, tnc.Budget(bits_per_weight=6.0), batches(), method="coded", workers=1)
    assert "model.embed_tokens" in {layer.name for layer in report.layers}
    assert model.lm_head.core0_near is model.model.embed_tokens.core0_near


def test_bytes_do_not_depend_on_the_number_of_workers() -> None:
    stored = []
    for workers in (1, 2):
        model = tiny_llama()
        tnc.compress(model, tnc.Budget(bits_per_weight=4.0), batches(), method="coded", workers=workers)
        stored.append(model.state_dict())
    assert all(torch.equal(stored[0][name], stored[1][name]) for name in stored[0])


def test_encoders_too() -> None:
    encoder = tiny_bert()
    report = tnc.compress(encoder, tnc.Budget(bits_per_weight=6.0), batches(), method="coded", workers=1)
    assert report.targeted_nbytes <= report.allowed_nbytes


def test_its_plan_makes_the_same_bytes_again() -> None:
    model, again = tiny_llama(), tiny_llama()
    tnc.compress(model, tnc.Budget(bits_per_weight=4.0), batches(), method="coded", workers=1)
    tnc.apply_plan(again, model.tensornet_plan, batches(), workers=1)
    wanted, made = model.state_dict(), again.state_dict()
    assert all(torch.equal(wanted[name], made[name]) for name in wanted)


@pytest.mark.parametrize("option", [{"formats": ["bf16"]}, {"search": 1.0}, {"allocator": "uniform"}])
def test_options_without_a_meaning_are_refused(option: dict[str, Any]) -> None:
    with pytest.raises(tnc.TensorNetError, match="leave out"):
        tnc.compress(tiny_llama(), tnc.Budget(bits_per_weight=4.0), batches(), method="coded", **option)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_cast_model_keeps_its_steps(dtype: torch.dtype) -> None:
    model = tiny_llama()
    tnc.compress(model, tnc.Budget(bits_per_weight=6.0), batches(), method="coded", workers=1)
    wanted = logits(model)
    assert (logits(model.to(dtype)).float() - wanted).abs().max() < 0.1 * wanted.abs().max()


def test_it_needs_calibration() -> None:
    with pytest.raises(tnc.TensorNetError, match="calibration"):
        tnc.compress(tiny_llama(), tnc.Budget(bits_per_weight=4.0), method="coded")


def test_without_calibration_errors_count_relative_to_each_layer() -> None:
    model, exact = tiny_llama(), tiny_llama()
    report = tnc.compress(model, tnc.Budget(bits_per_weight=5.0), allocator="energy", workers=1)
    assert 0.99 * report.allowed_nbytes <= report.targeted_nbytes <= report.allowed_nbytes
    errors = [layer.error / layer.weights for layer in report.layers]
    assert max(errors) < 4 * min(errors)
    assert (logits(model) - logits(exact)).square().mean() < 0.1 * logits(exact).square().mean()


@pytest.mark.parametrize("bits", [0.01, 40.0])
def test_budgets_beyond_what_steps_can_do(bits: float) -> None:
    if bits < 1:
        with pytest.raises(BudgetError, match="coarsest step"):
            tnc.compress(tiny_llama(), tnc.Budget(bits_per_weight=bits), batches(), workers=1)
        return
    model = tiny_llama()
    report = tnc.compress(model, tnc.Budget(bits_per_weight=bits), batches(), workers=1)
    assert torch.allclose(logits(model), logits(tiny_llama()), atol=1e-4)
    assert any("bytes are used" in note for note in report.notes)


def planted(rank: int) -> nn.Module:
    torch.manual_seed(rank)
    layer = nn.Linear(96, 96, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(96, rank) @ torch.randn(rank, 96))
    return nn.Sequential(layer)


@pytest.mark.parametrize("rank", [3, 96])
def test_two_cores_are_taken_where_singular_values_promise_less_loss(rank: int) -> None:
    errors = {}
    for method in ("auto", "coded"):
        model = planted(rank)
        report = tnc.compress(model, tnc.Budget(bits_per_weight=3.0), allocator="energy", method=method, workers=1)
        assert report.targeted_nbytes <= report.allowed_nbytes
        errors[method] = report.layers[0].error
        assert report.layers[0].family == ("svd" if (method, rank) == ("auto", 3) else "dense")
    # The energy that errors are relative to comes from a spectrum in single precision.
    assert errors["auto"] <= (1e-3 if rank == 3 else 1 + 1e-6) * errors["coded"]


def test_two_coded_cores_are_saved_loaded_and_made_again(tmp_path: Path) -> None:
    model = tiny_llama()
    with torch.no_grad():
        weight = model.model.layers[0].mlp.up_proj.weight
        weight.copy_(torch.outer(weight[:, 0], weight[0]) / weight.std())
    again = tiny_llama()
    again.load_state_dict(model.state_dict())
    report = tnc.compress(model, tnc.Budget(bits_per_weight=5.0), batches(), workers=1)
    assert {layer.name for layer in report.layers if layer.family == "svd"} == {"model.layers.0.mlp.up_proj"}
    tnc.save(model, tmp_path / "coded", report=report)
    assert torch.equal(logits(tnc.load(tmp_path / "coded")), logits(model))
    tnc.apply_plan(again, model.tensornet_plan, batches(), workers=1)
    assert torch.equal(logits(again), logits(model))


def trained_llama() -> nn.Module:
    """Sharper than random weights, so that layers feel the errors of those before them."""
    model = tiny_llama(layers=3)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "proj" in name:
                weight.mul_(3)
    return model


def test_the_most_effort_loses_least_and_its_plan_repeats_it() -> None:
    exact, data, test = trained_llama(), batches(8, 4, 32), batches(4, 4, 32, seed=5)
    lost = {}
    for effort in ("fast", "max"):
        model = trained_llama()
        report = tnc.compress(model, tnc.Budget(bits_per_weight=4.0), data, effort=effort, workers=1)
        assert report.targeted_nbytes <= report.allowed_nbytes
        with torch.no_grad():
            lost[effort] = sum(float(kl_divergence(exact(i).logits, model(i).logits)) for i in test)
    assert lost["max"] < lost["fast"]
    again = trained_llama()
    tnc.apply_plan(again, tnc.Plan.from_json(model.tensornet_plan.to_json()), data, workers=1)
    wanted, made = model.state_dict(), again.state_dict()
    assert all(torch.equal(wanted[name], made[name]) for name in wanted)


@pytest.mark.parametrize(
    ("options", "message"), [({"effort": "some"}, "'some'"), ({"effort": "max", "calibration": None}, "give")]
)
def test_efforts_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    options = {"calibration": batches(), "allocator": "energy"} | options
    with pytest.raises(tnc.TensorNetError, match=message):
        tnc.compress(tiny_llama(), tnc.Budget(bits_per_weight=4.0), workers=1, **options)


def test_a_compression_that_fails_on_its_way_leaves_the_model_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    import tensornet_compress.compressing.propagate as module

    model = tiny_llama()
    wanted = logits(model)
    monkeypatch.setattr(module, "relative_error", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        tnc.compress(model, tnc.Budget(bits_per_weight=4.0), batches(), effort="max", workers=1)
    assert torch.equal(logits(model), wanted)
