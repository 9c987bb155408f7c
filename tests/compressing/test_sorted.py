"""A model of sorted entries: the budget holds, modules gather, the folder and the plan give the same model again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import tensornet_compress as tnc
from tensornet_compress.coding import SortedFormat
from tensornet_compress.compressing.sizes import model_nbytes
from tests.models import batches, tiny_llama


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(batches(1, 2, 24)[0]).logits


def compressed(bits: float = 5.0, effort: str = "default") -> tuple[nn.Module, tnc.CompressionReport]:
    model = tiny_llama()
    return model, tnc.compress(model, tnc.Budget(bits_per_weight=bits), batches(), method="sorted", effort=effort, workers=1)


@pytest.mark.parametrize("effort", ["default", "max"])
@pytest.mark.parametrize("bits", [4.0, 6.0])
def test_the_budget_holds_and_is_used(bits: float, effort: str) -> None:
    model, report = compressed(bits, effort)
    assert 0.97 * report.allowed_nbytes <= report.targeted_nbytes <= report.allowed_nbytes
    assert report.nbytes == model_nbytes(model)
    # Of few numbers that matter much, floating point may lose less at the multiplier of the rest.
    families = [layer.family for layer in report.layers]
    assert set(families) <= {"sorted", "dense"}
    assert families.count("sorted") >= 0.9 * len(families)


def test_more_bits_lose_less() -> None:
    exact, errors = logits(tiny_llama()), []
    for bits in (4.0, 6.0):
        errors.append(float((logits(compressed(bits)[0]) - exact).square().mean() / exact.square().mean()))
    assert errors[0] > 4 * errors[1]


def test_saved_and_loaded_and_made_again_it_is_the_same_model(tmp_path: Path) -> None:
    model, report = compressed()
    tnc.save(model, tmp_path / "sorted", report=report)
    again = tnc.load(tmp_path / "sorted")
    assert torch.equal(logits(again), logits(model))
    assert model_nbytes(again) == report.nbytes
    planned = tnc.apply_plan(tiny_llama(), tnc.load_plan(tmp_path / "sorted"), batches(), workers=1)
    wanted, made = model.state_dict(), planned.state_dict()
    assert wanted.keys() == made.keys()
    assert all(torch.equal(wanted[name], made[name]) for name in wanted)


def test_modules_gather_and_their_values_can_be_trained() -> None:
    layer = nn.Linear(64, 32)
    model = nn.Sequential(layer)
    tnc.compress(model, tnc.Budget(bits_per_weight=5.5), allocator="energy", method="sorted", workers=1)
    module = model[0]
    assert isinstance(module.spec.terms[0].formats[0], SortedFormat)
    assert module.core0_group.dtype == torch.uint8
    assert module.core0_group.numel() == 64 * 32
    x = torch.randn(7, 64)
    assert torch.allclose(model(x), x @ module.weight.T + layer.bias, atol=1e-5)
    model(x).sum().backward()
    assert module.core0_scale.grad.abs().sum() > 0 < module.core0_profile.grad.abs().sum()


def test_embeddings_look_up_rows() -> None:
    table = nn.Embedding(50, 24)
    model = nn.Sequential(table)
    tnc.compress(model, tnc.Budget(bits_per_weight=6.0), allocator="energy", method="sorted", targets=["0"], workers=1)
    ids = torch.tensor([[3, 49], [3, 0]])
    assert torch.allclose(model(ids), model[0].weight[ids], atol=1e-6)
    assert (model(ids) - table(ids)).abs().mean() < 0.1


def test_formats_and_searches_have_no_meaning() -> None:
    for option in ({"formats": ["bf16"]}, {"search": 1.0}):
        with pytest.raises(tnc.TensorNetError, match="leave out"):
            tnc.compress(tiny_llama(), tnc.Budget(bits_per_weight=4.0), batches(), method="sorted", **option)
