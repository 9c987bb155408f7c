"""``bench model`` on a tiny model: whole files, their bytes and what they still know."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from tensornet_compress.bench.file_case import FILE_METHODS, FileCase
from tensornet_compress.bench.files import FileBench, FileSettings
from tensornet_compress.bench.peer_packages import Unavailable
from tensornet_compress.bench.run import run
from tensornet_compress.errors import TensorNetError
from tensornet_compress.progress import SilentProgress
from tests import models


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with room for the windows of quick runs."""
    place = tmp_path_factory.mktemp("models") / "llama"
    model = models.tiny_llama(layers=1)
    model.config.max_position_embeddings = 512
    model.save_pretrained(place)
    models.tiny_tokenizer().save_pretrained(place)
    return place


def test_rows_tell_bytes_speed_and_knowledge(folder: Path) -> None:
    settings = FileSettings(model=str(folder), bits=(6.0, 3.0), methods=("ours-coded", "gguf", "llama.cpp"), tokens=2, items=3)
    result = run({"model": FileBench(settings)}, "test", None, False, SilentProgress())
    rows = {(row.method, row.budget): row for row in result.rows}
    dense, fine, coarse = rows["dense", None], rows["ours-coded", 6.0], rows["ours-coded", 3.0]
    for row in (fine, coarse):
        assert row.budget is not None
        assert 0.9 * row.budget < row.values["bits_per_weight"] <= row.budget
        assert row.values["nbytes"] < row.values["file_nbytes"]
        assert set(row.values) == set(result.measures)
    for domain in ("prose", "technical", "python"):
        assert dense.values[f"kl_{domain}"] < fine.values[f"kl_{domain}"] < coarse.values[f"kl_{domain}"]
    peer = rows["gguf", 6.0]
    assert peer.note == "gguf Q5_1"
    assert peer.values["kl_prose"] > fine.values["kl_prose"]
    assert "smallest file takes 4." in (rows["gguf", 3.0].skipped or "")
    # Where it is installed, it looks for the GGUF file that this model does not come from.
    assert re.search("llama-cpp-python is not installed|starts from one GGUF file", rows["llama.cpp", 6.0].skipped or "")


def test_files_leave_the_model_as_it_was(folder: Path, tmp_path: Path) -> None:
    model = models.tiny_llama()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    case = FileCase("tiny", model, models.tiny_tokenizer(), models.batches(), tmp_path)
    _ = case.kept
    for name in ("ours", "gguf"):
        made = FILE_METHODS[name].run(case, 6.0)
        assert made.nbytes <= 6.3 * case.weights / 8
        assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
        assert not torch.equal(made.model(torch.arange(8)[None]).logits, model(torch.arange(8)[None]).logits)


def test_llama_cpp_needs_a_gguf_file(folder: Path, tmp_path: Path) -> None:
    from tensornet_compress.bench.peers.gguf_files import _source

    with pytest.raises(Unavailable, match="one GGUF file"):
        _source(FileCase(str(folder), None, None, [], tmp_path))


def test_encoders_are_refused() -> None:
    with pytest.raises(TensorNetError, match="no causal language model"):
        FileBench(FileSettings(model="all-minilm-l6-v2"))
