"""Folders that are damaged, incomplete or do not fit are refused with one clear error."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

import tensornet_compress as tnc
from tensornet_compress.errors import CheckpointError
from tensornet_compress.files import MANIFEST, TENSORS
from tensornet_compress.files.hashes import file_digest, sealed
from tensornet_compress.files.index import weight_files
from tests.files.saved import compressed, tensor_file, without_hashes
from tests.models import tiny_convnet


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.99])
def test_truncated_tensors_are_refused(folder, share):
    data = tensor_file(folder)
    (folder / TENSORS).write_bytes(data[: int(len(data) * share)])
    with pytest.raises(CheckpointError, match=r"truncated|damaged"):
        tnc.load(folder)


@pytest.mark.parametrize("name", [TENSORS, MANIFEST, "config.json"])
def test_missing_files_are_named(folder, name):
    os.remove(folder / name)
    with pytest.raises(CheckpointError, match=name):
        tnc.load(folder)


def edit_tensors(folder, change):
    without_hashes(folder)
    tensors = load_file(folder / TENSORS)
    change(tensors)
    save_file(tensors, folder / TENSORS, metadata={"format": "pt"})


def core_name(tensors):
    return next(name for name in sorted(tensors) if "core0" in name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(core_name(t)), "missing.*core0"),
        (lambda t: t.pop("model.norm.weight"), "missing.*model.norm.weight"),
        (lambda t: t.update(extra=torch.zeros(2)), "unknown.*extra"),
        (lambda t: t.update({"model.norm.weight": torch.zeros(3)}), r"model.norm.weight.*\(3,\).*\(32,\)"),
        (lambda t: t.update({core_name(t): torch.zeros(3, 3, dtype=t[core_name(t)].dtype)}), r"core0.*\(3, 3\)"),
        (lambda t: t.update({core_name(t): t[core_name(t)].to(torch.int64)}), "core0.*stored as"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(folder, change, message):
    edit_tensors(folder, change)
    with pytest.raises(CheckpointError, match=message):
        tnc.load(folder)


def edit_manifest(folder, change):
    without_hashes(folder)
    data = json.loads((folder / MANIFEST).read_text())
    change(data)
    (folder / MANIFEST).write_text(json.dumps(data))


def first_layer(data):
    return next(iter(data["plan"]["layers"].values()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(format_version=2), "version 2"),
        (lambda d: d.pop("format_version"), "version None"),
        (lambda d: d.update(surprise=1), "surprise"),
        (lambda d: d.pop("plan"), "plan"),
        (lambda d: d["plan"].update(version=7), "version"),
        (lambda d: first_layer(d)["spec"].update(version=7), "version"),
        (lambda d: first_layer(d).update(kind="lambda"), "kind"),
        (lambda d: first_layer(d)["spec"].update(shape=[1, 1]), "shape"),
        (lambda d: d["plan"]["layers"].update(ghost=first_layer(d)), "ghost"),
        (lambda d: d.update(nbytes=1), "manifest says 1"),
        (lambda d: d.update(shared={"lm_head.weight": "ghost.weight"}), "ghost.weight"),
        (lambda d: d.update(architecture=None), "model="),
    ],
)
def test_manifests_that_do_not_fit_are_refused(folder, change, message):
    edit_manifest(folder, change)
    with pytest.raises(CheckpointError, match=f"(?s).*{message}"):
        tnc.load(folder)


@pytest.mark.parametrize(
    "name",
    [
        "NoSuchModel",
        "os.system",
        "__builtins__",
        "pipeline",
        "PreTrainedModel",
        "AutoModel",
        "__import__('os')",
        "",
        "BertModel",
    ],
)
def test_an_architecture_is_a_model_class_of_transformers_or_refused(folder, name):
    edit_manifest(folder, lambda data: data.update(architecture=name))
    with pytest.raises(CheckpointError):
        tnc.load(folder)


@pytest.mark.parametrize("text", ["", "{", "[1, 2", '"text"', "null", "[]", "{}", "[" * 100_000, "\x00\x01"])
def test_damaged_json_is_refused(folder, text):
    (folder / MANIFEST).write_text(text)
    with pytest.raises(CheckpointError, match=MANIFEST):
        tnc.load(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"model_type": "llama", "hidden_size": "many"}'])
def test_a_damaged_configuration_is_refused(folder, text):
    without_hashes(folder)
    (folder / "config.json").write_text(text)
    with pytest.raises(CheckpointError):
        tnc.load(folder)


def without_geometry(folder):
    def change(data):
        next(layer for layer in data["plan"]["layers"].values() if layer["kind"] == "conv2d").update(geometry={"forward": 1})

    edit_manifest(folder, change)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: edit_tensors(folder, lambda tensors: tensors.pop("norm.running_mean")), "running_mean"),
        (without_geometry, "stride"),
    ],
)
def test_a_refused_file_leaves_the_given_instance_alone(tmp_path, damage, message):
    model = tiny_convnet()
    compressed(model, calibration=None, allocator="energy", budget=tnc.Budget(bits_per_weight=9.0))
    folder = tnc.save(model, tmp_path / "out")
    damage(folder)
    fresh = tiny_convnet(seed=3)
    before = {name: value.clone() for name, value in fresh.state_dict().items()}
    with pytest.raises(CheckpointError, match=message):
        tnc.load(folder, model=fresh)
    after = fresh.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    ("name", "value"), [("num_hidden_layers", 10**9), ("num_hidden_layers", -5), ("rms_norm_eps", float("nan"))]
)
def test_a_forged_configuration_with_fitting_hashes_is_refused(folder, name, value):
    """Hashes find damage; they are no signature."""
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {name: value}))
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["files"]["config.json"] = file_digest(config)
    (folder / MANIFEST).write_text(sealed(json.dumps(manifest | {"checksum": ""})))
    with pytest.raises(CheckpointError, match=rf"its configuration has {name} = "):
        tnc.load(folder)


def test_a_file_of_the_tokenizer_that_was_not_saved_is_refused(folder):
    (folder / "special_tokens_map.json").write_text('{"eos_token": "e"}')
    with pytest.raises(CheckpointError, match=r"special_tokens_map.json' was not saved with the model"):
        tnc.load(folder)


def test_an_index_of_pickled_shards_stays_in_its_folder(tmp_path):
    index = {"metadata": {}, "weight_map": {"model.norm.weight": "../other/pytorch_model.bin"}}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"'\.\./other/pytorch_model\.bin', which is no \.bin file of the folder itself"):
        weight_files(tmp_path)
