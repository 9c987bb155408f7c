"""Modules on another device for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tensornet_compress as tnc
from tensornet_compress.calibrate import sweeps
from tensornet_compress.calibrate.fisher_metrics import fisher_metrics
from tensornet_compress.calibrate.lending import lent, usable_device
from tensornet_compress.errors import TensorNetError
from tensornet_compress.files.steps import Steps
from tensornet_compress.nn import find_targets
from tests.models import batches, tiny_llama


class Shared(nn.Module):
    """A parameter of two modules, one that does not train, and buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3, bias=False)
        self.second.weight = self.first.weight
        self.norm = nn.BatchNorm1d(3)
        self.first.bias.requires_grad_(False)


@pytest.mark.parametrize("fails", [False, True])
def test_what_is_lent_comes_back_as_it_was(fails: bool) -> None:
    model, place = Shared(), torch.device("meta")
    before = [*model.parameters(), *model.buffers()]
    values = [tensor.clone() for tensor in before]
    try:
        with lent(model.modules(), place):
            assert {tensor.device for tensor in (*model.parameters(), *model.buffers())} == {place}
            assert model.first.weight is model.second.weight
            assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in before[:4]]
            if fails:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        assert fails
    after = [*model.parameters(), *model.buffers()]
    assert all(a is b for a, b in zip(after, before, strict=True))
    assert all(map(torch.equal, after, values))


def test_only_the_modules_named_are_lent_and_no_device_lends_nothing() -> None:
    model = Shared()
    with lent([model.norm], torch.device("meta")):
        assert model.first.weight.device.type == "cpu"
        assert model.norm.weight.is_meta
    with lent(model.modules(), None):
        assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))


def test_sweeps_use_nothing_that_is_not_lent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights are NaN except while they are lent: any pass that goes elsewhere comes out as NaN."""
    model, data = tiny_llama(), batches(2)
    chosen = find_targets(model, None, (), tables=True)[0]
    wanted = fisher_metrics(model, data, chosen)
    true = {tensor: tensor.detach().clone() for tensor in (*model.parameters(), *model.buffers())}
    at_once = []

    @contextmanager
    def only_now(modules: Any, device: torch.device) -> Iterator[None]:
        own = {t for m in modules for t in (*m._parameters.values(), *m._buffers.values()) if t is not None}
        assert device == torch.device("cpu")
        for tensor in own:
            tensor.data.copy_(true[tensor])
        at_once.append(sum(not bool(tensor.isnan().any()) for tensor in true))
        try:
            yield
        finally:
            for tensor in own:
                tensor.data.fill_(torch.nan)

    for tensor in true:
        tensor.data.fill_(torch.nan)
    monkeypatch.setattr(sweeps, "lent", only_now)
    swept = sweeps.FisherSweeps(model, data, chosen, Steps(tmp_path, lasting=False), device=torch.device("cpu"))
    found = {name: metric.load() for name, metric in swept.metrics()}
    assert found.keys() == wanted.keys()
    for name, metric in found.items():
        assert torch.equal(metric.rows, wanted[name].rows)  # type: ignore[arg-type]
        assert torch.equal(metric.columns, wanted[name].columns)  # type: ignore[arg-type]
    # Never more than one block beside what lies outside blocks.
    assert max(at_once) <= len(true) - len(list(model.model.layers[0].parameters()))
    assert all(bool(tensor.isnan().all()) for tensor in true)


@pytest.mark.parametrize("by_block", [False, True])
def test_a_device_by_name_changes_nothing_where_it_is_the_models_own(by_block: bool) -> None:
    reports = [
        tnc.compress(tiny_llama(), tnc.Budget(bits_per_weight=5.0), batches(2), workers=1, by_block=by_block, device=device)
        for device in (None, "cpu")
    ]
    assert reports[0].layers == reports[1].layers


@pytest.mark.parametrize("device", ["cuda:77", "no-such-device"])
def test_a_device_that_is_not_there_is_refused_before_anything_is_done(device: str, tmp_path: Path) -> None:
    with pytest.raises(TensorNetError, match=f"device '{device}' cannot be used here"):
        usable_device(device)
    tiny_llama().save_pretrained(tmp_path / "model")
    with pytest.raises(TensorNetError, match=f"device '{device}' cannot be used here"):
        tnc.compress_folder(tmp_path / "model", tmp_path / "out", tnc.Budget(bits_per_weight=5.0), batches(2), device=device)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
