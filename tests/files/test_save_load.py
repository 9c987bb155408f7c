import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import tensornet_compress as tnc
from tensornet_compress.errors import CheckpointError, TensorNetError
from tensornet_compress.evaluate.ledger import folder_ledger
from tensornet_compress.files import MANIFEST, TENSORS, read_manifest
from tensornet_compress.nn import NetworkModule, replace_module
from tensornet_compress.nn.plan import LayerPlan
from tensornet_compress.tensor import FibreOrder
from tests.files.saved import compressed, tensor_file
from tests.models import ConvNet, batches, tiny_bert, tiny_convnet, tiny_gpt2, tiny_llama, tiny_tokenizer


def state_equal(one, other):
    first, second = one.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(
        torch.equal(first[name], second[name]) and first[name].dtype == second[name].dtype for name in first
    )


def in_bf16(model):
    """Parameters only, as from_pretrained does: rotary frequencies stay in float32."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    return model


EMBEDDED = ["*_proj", "embed_tokens", "lm_head"]
CASES = {
    "llama tied": (lambda: tiny_llama(tied=True), {}),
    "llama tied, head compressed": (lambda: tiny_llama(tied=True), {"targets": EMBEDDED}),
    "llama untied, head compressed": (lambda: tiny_llama(tied=False), {"targets": EMBEDDED}),
    "llama bf16": (lambda: in_bf16(tiny_llama()), {}),
    "llama svd": (
        tiny_llama,
        {"method": "svd", "formats": ["bf16"], "allocator": "uniform", "budget": tnc.Budget(bits_per_weight=14.0)},
    ),
    "llama pivots, head too": (
        lambda: in_bf16(tiny_llama()),
        {"method": "svd", "formats": ["bf16p"], "allocator": "uniform", "budget": tnc.Budget(bits_per_weight=14.0)}
        | {"targets": EMBEDDED},
    ),
    "llama tree": (
        tiny_llama,
        {"method": "tree", "formats": ["int8g64"], "allocator": "uniform", "budget": tnc.Budget(bits_per_weight=9.0)},
    ),
    "gpt2": (tiny_gpt2, {}),
    "bert": (tiny_bert, {"targets": ["encoder.*", "word_embeddings"]}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_saved_model_comes_back_bit_for_bit(case, tmp_path):
    build, options = CASES[case]
    model = build()
    report = compressed(model, **options)
    ids = batches(1, seed=5)[0]
    with torch.no_grad():
        wanted = model(ids)[0]
        tnc.save(model, tmp_path / "out", tokenizer=tiny_tokenizer(), report=report)
        loaded = tnc.load(tmp_path / "out")
        assert type(loaded) is type(model)
        assert state_equal(model, loaded)
        assert torch.equal(loaded(ids)[0], wanted)
    assert not loaded.training
    assert sum(isinstance(m, NetworkModule) for m in loaded.modules()) == sum(
        isinstance(m, NetworkModule) for m in model.modules()
    )
    manifest = read_manifest(tmp_path / "out")
    tensors = load_file(tmp_path / "out" / TENSORS)
    assert sum(t.numel() * t.element_size() for t in tensors.values()) == manifest.nbytes == report.nbytes


def test_marks_that_are_not_the_pivots_are_refused_on_loading(tmp_path):
    model = tiny_convnet()
    options = {"method": "svd", "formats": ["bf16p"], "allocator": "uniform", "targets": ["head"], "calibration": None}
    compressed(model, budget=tnc.Budget(bits_per_weight=14.0), **options)
    tnc.save(model, tmp_path / "out")
    tensors = load_file(tmp_path / "out" / TENSORS)
    assert tensors["head.core0_pivots"].dtype == torch.uint8
    tensors["head.core0_pivots"] ^= 1
    save_file(tensors, tmp_path / "out" / TENSORS)
    other = tiny_convnet(seed=1)
    before = [parameter.clone() for parameter in other.parameters()]
    with pytest.raises(CheckpointError, match="pivots"):
        tnc.load(tmp_path / "out", model=other)
    assert all(torch.equal(a, b) for a, b in zip(before, other.parameters()))


def test_tied_parameters_come_back_tied(tmp_path):
    for targets in (["*_proj"], EMBEDDED):
        model = tiny_llama(tied=True)
        compressed(model, targets=targets)
        loaded = tnc.load(tnc.save(model, tmp_path / str(len(targets))))
        names = model.model.embed_tokens.state_dict()
        assert all(getattr(loaded.model.embed_tokens, name) is getattr(loaded.lm_head, name) for name in names)


def test_a_loaded_model_generates(tmp_path):
    model = tiny_llama()
    compressed(model)
    loaded = tnc.load(tnc.save(model, tmp_path / "out"))
    prompt = batches(1, rows=1, length=4)[0]
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    assert torch.equal(loaded.generate(prompt, **options), model.generate(prompt, **options))


def test_loading_changes_no_global_state(tmp_path):
    model = tiny_llama()
    compressed(model)
    tnc.save(model, tmp_path / "out")
    random, threads, dtype = torch.get_rng_state(), torch.get_num_threads(), torch.get_default_dtype()
    tnc.load(tmp_path / "out")
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.get_num_threads() == threads
    assert torch.get_default_dtype() == dtype


def test_a_plain_module_with_convolutions_is_loaded_into_an_instance(tmp_path):
    model = tiny_convnet()
    compressed(model, calibration=None, allocator="energy", budget=tnc.Budget(bits_per_weight=9.0))
    tnc.save(model, tmp_path / "out")
    loaded = tnc.load(tmp_path / "out", model=ConvNet())
    x = torch.randn(2, 3, 12, 12)
    assert state_equal(model, loaded)
    assert torch.equal(loaded(x), model(x))
    with pytest.raises(CheckpointError, match="model="):
        tnc.load(tmp_path / "out")
    with pytest.raises(CheckpointError, match="modules"):
        tnc.load(tmp_path / "out", model=torch.nn.Linear(2, 2))


def test_fibre_orders_travel_as_packed_tensors(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(12, 40))
    layout = tnc.Layout.of(((40,), (3, 4)), fibre_orders=(FibreOrder(axis=0, permutation=tuple(torch.randperm(40).tolist())),))
    network = tnc.to_network(model[0].weight, tnc.Topology.train(3), layout, ranks=4)
    plan = tnc.Plan(layers={"0": LayerPlan(kind="linear", spec=network.spec, bias=True)})
    tnc.apply_plan(model, plan, workers=1)
    tnc.save(model, tmp_path / "out")
    tensors = load_file(tmp_path / "out" / TENSORS)
    assert tensors["0.order0"].numel() == layout.order_nbytes
    loaded = tnc.load(tmp_path / "out", model=torch.nn.Sequential(torch.nn.Linear(12, 40)))
    assert loaded[0].spec == model[0].spec
    assert torch.equal(loaded[0].weight, model[0].weight)
    assert folder_ledger(tmp_path / "out").totals()["folder"] == sum(f.stat().st_size for f in (tmp_path / "out").iterdir())


def test_an_order_costs_the_file_about_what_it_is_charged(tmp_path):
    sizes = []
    for orders in ((), (FibreOrder(axis=0, permutation=tuple(reversed(range(500)))),)):
        model = torch.nn.Sequential(torch.nn.Linear(4, 500))
        layout = tnc.Layout.of(((500,), (4,)), fibre_orders=orders)
        network = tnc.to_network(model[0].weight, tnc.Topology.train(2), layout, ranks=1)
        plan = tnc.Plan(layers={"0": LayerPlan(kind="linear", spec=network.spec, bias=True)})
        tnc.save(tnc.apply_plan(model, plan, workers=1), tmp_path / str(len(orders)))
        sizes.append(sum(path.stat().st_size for path in (tmp_path / str(len(orders))).iterdir()))
    assert sizes[1] - sizes[0] <= layout.order_nbytes + 300


def test_the_ledger_adds_up_to_the_folder(tmp_path):
    model = tiny_llama()
    report = compressed(model)
    tnc.save(model, tmp_path / "out", tokenizer=tiny_tokenizer(), report=report)
    ledger = folder_ledger(tmp_path / "out")
    on_disk = sum(f.stat().st_size for f in (tmp_path / "out").rglob("*") if f.is_file())
    totals = ledger.totals()
    assert totals["folder"] == on_disk
    assert sum(value for name, value in totals.items() if name != "folder") == on_disk
    assert {row.name: row.nbytes for row in ledger.layers} == {layer.name: layer.nbytes for layer in report.layers}
    assert {row.name: row.error for row in ledger.layers} == {layer.name: layer.error for layer in report.layers}
    assert totals["compressed layers"] + totals["other tensors"] == report.nbytes
    assert sum(row.nbytes for row in ledger.by_kind()) == report.targeted_nbytes
    assert sum(row.weights for row in ledger.by_kind()) == report.targeted_weights


def test_the_plan_alone_gives_the_same_bytes_again(tmp_path):
    model = tiny_llama()
    compressed(model)
    tnc.save(model, tmp_path / "first")
    plan = tnc.Plan.from_json(read_manifest(tmp_path / "first").plan.to_json())
    again = tnc.apply_plan(tiny_llama(), plan, batches(2), workers=1)
    tnc.save(again, tmp_path / "again")
    assert tensor_file(tmp_path / "first") == tensor_file(tmp_path / "again")
    assert read_manifest(tmp_path / "again").plan == plan
    with pytest.raises(TensorNetError, match="same batches"):
        tnc.apply_plan(tiny_llama(), plan, batches(2, seed=9))
    with pytest.raises(TensorNetError, match="same batches"):
        tnc.apply_plan(tiny_llama(), plan)
    with pytest.raises(TensorNetError, match="lacks"):
        tnc.apply_plan(tiny_gpt2(), plan, batches(2))


def test_workers_do_not_change_the_bytes(tmp_path):
    for workers in (1, 2):
        model = tiny_llama(layers=1)
        compressed(model, workers=workers)
        tnc.save(model, tmp_path / str(workers))
    assert tensor_file(tmp_path / "1") == tensor_file(tmp_path / "2")
    assert (tmp_path / "1" / MANIFEST).read_bytes() == (tmp_path / "2" / MANIFEST).read_bytes()


def test_what_was_not_compressed_is_not_saved(tmp_path):
    with pytest.raises(CheckpointError, match="compress"):
        tnc.save(tiny_llama(), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_networks_outside_the_plan_are_not_saved(tmp_path):
    """A folder that cannot be loaded again must not be written."""
    model = tiny_llama()
    compressed(model, targets=["q_proj"])
    name = "model.layers.0.mlp.up_proj"
    replace_module(model, name, tnc.to_network(model.get_submodule(name).weight, ranks=2))
    with pytest.raises(CheckpointError, match="up_proj"):
        tnc.save(model, tmp_path / "out")
    model = tiny_llama()
    compressed(model, targets=["q_proj"])
    tnc.materialize(model)
    with pytest.raises(CheckpointError, match="no plan"):
        tnc.save(model, tmp_path / "out")


def test_a_model_compressed_in_two_passes_is_refused_rather_than_saved_in_part(tmp_path):
    """The second pass calibrates on compressed layers, which no plan for the original model can repeat."""
    model = tiny_llama(layers=1)
    compressed(model, targets=["mlp.*"])
    with pytest.raises(TensorNetError, match="one call"):
        tnc.save(model, tmp_path / "out") if compressed(model, targets=["self_attn.*"]) else None
    assert not list(tmp_path.iterdir())


class Breaks:
    """A tokenizer that writes a file and then fails."""

    def save_pretrained(self, folder):
        (Path(folder) / "tokenizer.json").write_text("{")
        raise OSError("disk full")


def test_a_save_that_fails_leaves_nothing(folder, tmp_path):
    model = tnc.load(folder)
    with pytest.raises(OSError, match="disk full"):
        tnc.save(model, tmp_path / "new", tokenizer=Breaks())
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(OSError, match="disk full"):
        tnc.save(model, folder, tokenizer=Breaks(), overwrite=True)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_existing_folder_is_replaced_only_when_asked(folder, tmp_path):
    model = tnc.load(folder)
    with pytest.raises(CheckpointError, match="exists"):
        tnc.save(model, folder)
    tnc.save(model, folder, overwrite=True)
    assert state_equal(tnc.load(folder), model)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    (tmp_path / "file").write_text("mine")
    with pytest.raises(CheckpointError, match="file"):
        tnc.save(model, tmp_path / "file", overwrite=True)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_part_of_a_compressed_model_does_not_save_itself(tmp_path):
    """The whole does (tests/integrations); of a part no plan tells."""
    model = tiny_llama()
    tnc.compress(model, tnc.Budget(bits_per_weight=8.5), targets=["q_proj"], allocator="energy", workers=1)
    for whole in (model, copy.deepcopy(model)):
        with pytest.raises(CheckpointError, match=r"use tnc.save\(model, folder\)"):
            whole.model.save_pretrained(tmp_path / "plain")
    dense, ids = tnc.materialize(model), batches(1)[0]
    dense.save_pretrained(tmp_path / "plain")
    assert torch.equal(type(model).from_pretrained(tmp_path / "plain")(ids).logits, dense(ids).logits)
