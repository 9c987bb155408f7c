"""Layouts searched per kind of layer: found where they exist, shared by siblings, refused where there are none."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import tensornet_compress as tnc
from tensornet_compress.compressing import Layer, WeightSource
from tensornet_compress.compressing.layouts import layer_kind, search_layouts
from tensornet_compress.errors import TensorNetError


def crossed(seed: int) -> Tensor:
    """Row digits paired with the other column digit: no family in native order has small ranks."""
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(8, 8, generator=generator) for _ in range(2))
    return torch.einsum("ad,bc->abcd", a, b).reshape(64, 64)


class Pair(nn.Module):
    """Two blocks with a layer of one kind each."""

    def __init__(self, weights: list[Tensor]):
        super().__init__()
        self.blocks = nn.ModuleList(nn.ModuleDict({"proj": nn.Linear(64, 64, bias=False)}) for _ in weights)
        for block, weight in zip(self.blocks, weights):
            block["proj"].weight.data = weight  # type: ignore[index]

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block["proj"](x)  # type: ignore[index]
        return x


def test_a_layout_found_on_one_layer_serves_its_sibling() -> None:
    weights = [crossed(0), crossed(1)]
    model = Pair([weight.clone() for weight in weights])
    report = tnc.compress(
        model, tnc.Budget(bits_per_weight=1.0), method="searched", formats=["bf16"], allocator="energy", search=20.0
    )
    assert [layer.family for layer in report.layers] == ["searched", "searched"]
    assert max(layer.error for layer in report.layers) < 1e-3
    for block, weight in zip(model.blocks, weights):
        assert float((block["proj"].network().to_dense() - weight).norm() / weight.norm()) < 0.01  # type: ignore[index,operator]
    assert any("searched proj 64 x 64" in note for note in report.notes)


def test_noise_gets_no_layout_and_the_report_says_so() -> None:
    torch.manual_seed(0)
    model = Pair([torch.randn(64, 64)])
    report = tnc.compress(model, tnc.Budget(bits_per_weight=5.0), method="auto", allocator="energy", search=20.0)
    assert report.layers[0].family == "dense"
    assert any("searched proj 64 x 64" in note and "accepted:" not in note for note in report.notes), report.notes


def test_every_kind_is_searched_once() -> None:
    torch.manual_seed(0)
    shapes = {"a.q": (8, 12), "b.q": (8, 12), "a.k": (4, 12), "b.k": (4, 12)}
    jobs = [Layer(name, WeightSource(0, torch.randn(shape))) for name, shape in shapes.items()]
    found = search_layouts(jobs, 5.0)
    assert list(found) == ["q 8 x 12", "k 4 x 12"] == list(dict.fromkeys(layer_kind(n, s) for n, s in shapes.items()))
    assert [item.layer for item in found.values()] == ["b.q", "b.k"]


def test_searched_without_a_search_and_nonsense_seconds_are_refused() -> None:
    model = Pair([torch.randn(64, 64)])
    with pytest.raises(TensorNetError, match="search=60"):
        tnc.compress(model, tnc.Budget(bits_per_weight=4.0), method="searched", allocator="energy")
    with pytest.raises(TensorNetError, match="was given 0"):
        tnc.compress(model, tnc.Budget(bits_per_weight=4.0), allocator="energy", search=0)
