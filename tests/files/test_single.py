"""One network in one file: nothing is lost, bytes are those counted, and damaged files are refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from safetensors.torch import load_file, save_file

import tensornet_compress as tnc
from tensornet_compress.errors import CheckpointError, TensorNetError
from tests.generators import SEEDS, random_tensor, specs


@given(specs(), SEEDS)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_network_comes_back(tmp_path: Path, spec: tnc.NetworkSpec, seed: int) -> None:
    network = tnc.TensorNetwork.from_cores(
        spec,
        [
            [random_tensor(term.core_shape(core), seed, torch.float32) for core in range(len(term.formats))]
            for term in spec.terms
        ],
    )
    file = tmp_path / "network.safetensors"
    assert tnc.save_network(network, file) == file.stat().st_size
    assert sum(part.nbytes for part in load_file(file).values()) == network.nbytes
    again = tnc.load_network(file)
    assert again.spec == network.spec
    assert torch.equal(again.to_dense(), network.to_dense())
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    x = torch.linspace(0, 1, 48)[:, None]
    rows = torch.randperm(48, generator=torch.Generator().manual_seed(0))
    found = tnc.search(torch.sin(9 * x * x.T + x)[rows], max_error=0.02, null=False).best
    assert found.spec.terms[0].layout.fibre_orders, "an order is to be saved"
    tnc.save_network(found, tmp_path / "network.safetensors")
    return tmp_path / "network.safetensors"


@pytest.mark.parametrize("share", [0.0, 0.1, 0.9])
def test_truncated_files_are_refused(saved: Path, share: float) -> None:
    data = saved.read_bytes()
    saved.write_bytes(data[: int(share * len(data))])
    with pytest.raises(CheckpointError, match="cannot be read"):
        tnc.load_network(saved)


def test_missing_files_and_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nothing\.safetensors"):
        tnc.load_network(tmp_path / "nothing.safetensors")
    with pytest.raises(TensorNetError, match="folder"):
        tnc.save_network(tnc.to_network(torch.ones(4, 4), max_error=0.1), tmp_path)


def test_other_files_are_refused(tmp_path: Path) -> None:
    save_file({"x": torch.ones(2)}, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match="holds no network"):
        tnc.load_network(tmp_path / "x.safetensors")


@pytest.mark.parametrize("part", ["order0", "core0"])
@pytest.mark.parametrize("change", ["missing", "dtype", "shape"])
def test_damaged_parts_are_named(saved: Path, part: str, change: str) -> None:
    from safetensors import safe_open

    with safe_open(saved, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(saved)
    name = next(name for name in sorted(tensors) if part in name)
    if change == "missing":
        del tensors[name]
    else:
        tensors[name] = tensors[name].to(torch.float64) if change == "dtype" else tensors[name].reshape(-1)[:-1].clone()
    save_file(tensors, saved, metadata)
    with pytest.raises(CheckpointError, match=part.rstrip("0")):
        tnc.load_network(saved)
