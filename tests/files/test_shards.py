"""Folders whose tensors lie in several files."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import tensornet_compress as tnc
from tensornet_compress.errors import CheckpointError
from tensornet_compress.evaluate.ledger import folder_ledger
from tests.file_reader import read_model
from tests.files.saved import compressed
from tests.models import batches, tiny_llama

SMALL = 4000


@pytest.fixture
def both(tmp_path):
    """A model, its folder of one file, and that of several."""
    model = tiny_llama()
    compressed(model, method="coded", budget=tnc.Budget(bits_per_weight=6.5))
    return model, tnc.save(model, tmp_path / "one"), tnc.save(model, tmp_path / "several", max_shard_nbytes=SMALL)


def answer(model):
    with torch.no_grad():
        return model(batches(1)[0]).logits


def test_they_load_as_the_one_file_does(both):
    model, one, several = both
    shards = sorted(several.glob("*.safetensors"))
    assert len(shards) > 2
    assert not (several / "model.safetensors").exists()
    for shard in shards:
        tensors = load_file(shard)
        assert len(tensors) == 1 or sum(tensor.nbytes for tensor in tensors.values()) <= SMALL
    assert torch.equal(answer(tnc.load(several)), answer(model))
    assert torch.equal(answer(AutoModelForCausalLM.from_pretrained(several)), answer(model))
    assert tnc.load_plan(several) == tnc.load_plan(one)
    assert all((a == b).all() for a, b in zip(read_model(several)[2].values(), read_model(one)[2].values()))


def test_the_ledger_adds_up_to_all_files(both):
    _, one, several = both
    first, second = folder_ledger(one), folder_ledger(several)
    assert first.layers == second.layers
    files = sum(path.stat().st_size for path in several.iterdir())
    tensors = sum(row.nbytes for row in second.layers) + sum(second.other_tensors.values())
    assert tensors + second.header + sum(second.files.values()) == files


def test_overwriting_leaves_no_file_of_the_other_kind(both):
    model, one, several = both
    names = {folder: {path.name for path in folder.iterdir()} for folder in (one, several)}
    tnc.save(model, one, overwrite=True, max_shard_nbytes=SMALL)
    tnc.save(model, several, overwrite=True)
    assert {path.name for path in one.iterdir()} == names[several]
    assert {path.name for path in several.iterdir()} == names[one]
    tnc.save(model, several, keep=True, max_shard_nbytes=SMALL)
    assert {path.name for path in several.iterdir()} == names[several]
    assert torch.equal(answer(tnc.load(several)), answer(model))


def test_damage_is_refused(both):
    _, _, several = both
    index = several / "model.safetensors.index.json"
    known = json.loads(index.read_text())
    first, *_, last = sorted(several.glob("*.safetensors"))
    tensors = load_file(last)
    save_file({name: tensor.flip(0) for name, tensor in tensors.items()}, last, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"index\.json' is damaged: the bytes of"):
        tnc.load(several)
    save_file(tensors, last, {"format": "pt"})
    tnc.load(several)
    index.write_text(json.dumps(known | {"weight_map": dict.fromkeys(known["weight_map"], "../one/x.safetensors")}))
    with pytest.raises(CheckpointError, match=r"which is no \.safetensors file of the folder itself"):
        tnc.load(several)
    index.write_text(json.dumps(known))
    first.unlink()
    with pytest.raises(CheckpointError, match=r"cannot be read|missing"):
        tnc.load(several)
