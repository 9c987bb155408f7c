"""Exports: lossless where the target has the grid, measured where it has not, read by readers that do not know this package."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import tensornet_compress as tnc
from tensornet_compress.errors import CheckpointError, TensorNetError
from tensornet_compress.integrations import compressed_tensors, gguf_file
from tensornet_compress.integrations.grids import grid_of
from tensornet_compress.nn.plan import LayerPlan, Plan
from tensornet_compress.nn.replace import install
from tensornet_compress.tensor import NetworkSpec, TensorNetwork
from tests.files.saved import compressed
from tests.files.test_save_load import in_bf16
from tests.models import batches, tiny_gpt2, tiny_llama, tiny_tokenizer

IDS = batches(1, seed=5)[0]
INTEGERS = ("int2g32", "int3g16z", "int4g32", "int4g0z", "int5g32z", "int6g24", "int8g32", "int8g0z")
OFFSETS = ("int2g32o", "int4g32o", "int5g0o")


def integer(name, shape=(8, 64)):
    spec = NetworkSpec.dense(shape, tnc.parse_format(name))
    return TensorNetwork.from_cores(spec, [[torch.randn(shape) + 0.5]])


def saved(tmp_path, formats, model=None, **names):
    """A folder of a tiny Llama whose linear layers take these formats in turns, as they are; the logits that it gives."""
    model = model or tiny_llama()
    layers = [name for name, module in model.named_modules() if type(module) is torch.nn.Linear and "proj" in name]
    networks = {}
    for number, name in enumerate(layers):
        weight = model.get_submodule(name).weight.detach()
        dtype = str(weight.dtype).removeprefix("torch.")
        spec = NetworkSpec.dense(tuple(weight.shape), tnc.parse_format(formats[number % len(formats)]), dtype)
        networks[name] = TensorNetwork.from_cores(spec, [[weight.float()]])
    plan = Plan(layers={name: LayerPlan(kind="linear", spec=network.spec) for name, network in networks.items()})
    install(model, networks, plan)
    folder = tnc.save(model, tmp_path / "saved", tokenizer=tiny_tokenizer())
    with torch.no_grad():
        return folder, model(IDS).logits


def logits(folder, **options):
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder, **options)(IDS).logits


@pytest.mark.parametrize("name", INTEGERS + OFFSETS)
def test_a_grid_is_the_network_and_keeps_its_numbers_in_other_forms(name):
    network = integer(name)
    grid = grid_of(network)
    assert torch.equal(grid.to_dense(), network.to_dense())
    assert torch.equal(grid.regrouped(8).to_dense(), network.to_dense())
    if name in INTEGERS and name != "int8g0z":
        assert torch.equal(grid.symmetric(8).to_dense(), network.to_dense())


def test_ragged_groups_are_cut_to_equal_ones():
    network = integer("int4g48z")
    assert grid_of(network).width == 16
    assert torch.equal(grid_of(network).to_dense(), network.to_dense())


def test_what_is_no_grid_has_none():
    assert grid_of(tnc.to_network(torch.randn(8, 64), ranks=2)) is None
    assert grid_of(integer("int4g128")) is None


@pytest.mark.parametrize("name", INTEGERS[:-1])
def test_words_are_those_of_compressed_tensors(name):
    """The other package's own reader gives our numbers."""
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    network = integer(name, (6, 48))
    if grid_of(network) is None:
        network = integer(name)
    scheme = compressed_tensors.Scheme.holding([grid_of(network)], range(2, 10))
    arguments = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**scheme.to_json()))
    parts = scheme.parts(grid_of(network))
    parts["weight_scale"] = parts["weight_scale"].float()
    read = PackedQuantizationCompressor.decompress(parts, arguments)["weight"]
    assert torch.equal(read, network.to_dense())


@pytest.mark.parametrize("name", [*(n for n in INTEGERS if "g32" in n or "g0" in n), *OFFSETS])
def test_blocks_are_those_of_gguf(name):
    """The other package's own reader gives our numbers, in as few bits as a block type has."""
    network = integer(name)
    stored = gguf_file.in_blocks(grid_of(network))
    if name == "int8g0z":
        assert stored is None
    else:
        assert torch.allclose(stored.to_dense(), network.to_dense(), rtol=1e-6, atol=1e-6)
        wanted = {"int2g32": "Q4_0", "int4g32": "Q4_0", "int4g0z": "Q5_0", "int2g32o": "Q4_1", "int4g32o": "Q4_1"}
        assert stored.kind == wanted.get(name, stored.kind)


FOUR_AND_EIGHT = ["int4g32", "int8g32", "int4g16z", "int3g0z"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("bits", "formats"), [((4, 8), FOUR_AND_EIGHT), (range(2, 9), INTEGERS[:6])])
def test_a_compressed_tensors_folder_gives_equal_logits(bits, formats, dtype, tmp_path):
    pytest.importorskip("compressed_tensors")
    folder, wanted = saved(tmp_path, formats, in_bf16(tiny_llama()) if dtype == torch.bfloat16 else None)
    report = tnc.export(folder, tmp_path / "out", bits=bits)
    assert (report.error == 0) if dtype == torch.float32 else (report.error < 0.003)
    tensors = load_file(tmp_path / "out" / "model.safetensors").values()
    assert report.nbytes == sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    schemes = {name: number for number, group in config["config_groups"].items() for name in group["targets"]}
    for names in compressed_tensors.fused(schemes):
        assert len({schemes[name] for name in names}) == 1, names
    given = logits(tmp_path / "out")
    assert given.dtype == dtype
    assert torch.equal(given, wanted) if dtype == torch.float32 else torch.allclose(given.float(), wanted.float(), atol=0.2)


def test_what_has_no_grid_becomes_dense_or_is_rounded(tmp_path):
    model = tiny_llama()
    compressed(model, method="coded", budget=tnc.Budget(bits_per_weight=6.5))
    folder = tnc.save(model, tmp_path / "saved")
    dense = tnc.export(folder, tmp_path / "dense")
    assert {layer.stored_as for layer in dense.layers} == {"float32"}
    assert dense.error == 0
    rounded = tnc.export(folder, tmp_path / "rounded", nearest="int8g32")
    stored = {layer.name: layer for layer in rounded.layers}
    assert stored["model.layers.0.mlp.up_proj"].stored_as == "int8"
    assert 1e-4 < stored["model.layers.0.mlp.up_proj"].error < 0.02
    assert rounded.nbytes < dense.nbytes
    assert "int8" not in stored["model.embed_tokens"].stored_as, "an embedding is no linear layer"


def test_layers_that_are_joined_later_become_dense_together(tmp_path):
    folder, _ = saved(tmp_path, ["int4g32", "int4g32o", "int4g32"])
    report = tnc.export(folder, tmp_path / "out")
    stored = {layer.name: layer.stored_as for layer in report.layers}
    assert {stored[f"model.layers.0.self_attn.{name}_proj"] for name in "qkv"} == {"float32"}
    assert "vLLM" in report.notes[0]
    apart = tnc.export(folder, tmp_path / "apart", fuse=False)
    assert {layer.stored_as for layer in apart.layers} == {"int4", "float32"}, "offsets have no place there"
    assert apart.nbytes < report.nbytes


def test_gguf_through_the_reader_of_transformers(tmp_path):
    folder, wanted = saved(tmp_path, ["int4g32", "int5g32o", "bf16", "int8g32"])
    report = tnc.export(folder, tmp_path / "model.gguf", to="gguf")
    assert report.error < 1e-6
    assert {layer.stored_as for layer in report.layers} == {"Q4_0", "Q5_1", "BF16", "Q8_0"}
    given = logits(tmp_path, gguf_file="model.gguf", dtype=torch.float32)
    assert torch.allclose(given, wanted, rtol=1e-3, atol=1e-4)


def qwen(kind):
    import transformers

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    # Of a Qwen 3 the reader of transformers does not read the width of heads and takes 128 for it.
    width = 128 if kind == "Qwen3" else 8
    more = {
        "num_key_value_heads": 2,
        "vocab_size": 64,
        "head_dim": width,
        "initializer_range": 0.2,
        "max_position_embeddings": 64,
    }
    config = getattr(transformers, f"{kind}Config")(**sizes, **more)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    return model


@pytest.mark.parametrize("kind", ["Qwen2", "Qwen3", "Mistral"])
def test_other_families_in_gguf(kind, tmp_path):
    folder, wanted = saved(tmp_path, ["int8g32"], qwen(kind))
    tnc.export(folder, tmp_path / "model.gguf", to="gguf")
    given = logits(tmp_path, gguf_file="model.gguf", dtype=torch.float32)
    assert torch.allclose(given, wanted, rtol=1e-3, atol=1e-3)


def test_gguf_rounds_what_no_block_holds_and_says_how_far(tmp_path):
    model = tiny_llama()
    compressed(model, method="coded", budget=tnc.Budget(bits_per_weight=6.5))
    report = tnc.export(tnc.save(model, tmp_path / "saved"), tmp_path / "model.gguf", to="gguf")
    assert {layer.stored_as for layer in report.layers} == {"Q8_0"}
    assert 1e-4 < report.error < 0.02
    assert "tokenizer" in report.notes[0]
    dense = tnc.export(tmp_path / "saved", tmp_path / "dense.gguf", to="gguf", dtype="float16")
    assert {layer.stored_as for layer in dense.layers} == {"F16"}
    assert dense.error < 1e-3
    both = {"nearest": "int8g32", "dtype": "float16"}
    rounded = tnc.export(tmp_path / "saved", tmp_path / "rounded.gguf", to="gguf", **both)
    assert {layer.stored_as for layer in rounded.layers} == {"Q8_0"}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dense_folders_are_plain_ones(dtype, tmp_path):
    folder, wanted = saved(tmp_path, ["int4g32z"])
    report = tnc.export(folder, tmp_path / "out", to="dense", dtype=dtype)
    assert (report.error == 0) == (dtype == "float32")
    given = logits(tmp_path / "out")
    assert given.dtype == getattr(torch, dtype)
    assert torch.allclose(given.float(), wanted, atol=0.2)
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    assert not (tmp_path / "out" / "tensornet.json").exists()


def test_a_budget_in_another_format(tmp_path):
    """Restricted formats make lossless exports."""
    pytest.importorskip("compressed_tensors")
    model = tiny_llama()
    tnc.compress(model, tnc.Budget(bits_per_weight=8.0), batches(2), formats="compressed-tensors", workers=1)
    with torch.no_grad():
        wanted = model(IDS).logits
    report = tnc.export(tnc.save(model, tmp_path / "saved"), tmp_path / "out", fuse=False)
    assert report.error == 0
    assert torch.allclose(logits(tmp_path / "out"), wanted, rtol=1e-4, atol=1e-5)
    model = tiny_llama()
    tnc.compress(model, tnc.Budget(bits_per_weight=8.0), batches(2), formats="gguf", workers=1)
    report = tnc.export(tnc.save(model, tmp_path / "again"), tmp_path / "model.gguf", to="gguf")
    assert report.error < 1e-7
    assert report.nbytes == report.source_nbytes, "blocks take what our integers take"
    with pytest.raises(TensorNetError, match=r"'gguf'.*dense"):
        tnc.compress(tiny_llama(), tnc.Budget(bits_per_weight=8.0), batches(2), formats="gguf", method="svd")


def test_bad_wishes_are_refused(tmp_path):
    folder, _ = saved(tmp_path, ["int4g32"])
    with pytest.raises(TensorNetError, match="onnx"):
        tnc.export(folder, tmp_path / "out", to="onnx")
    with pytest.raises(TensorNetError, match="int7"):
        tnc.export(folder, tmp_path / "out", dtype="int7")
    with pytest.raises(TensorNetError, match="9"):
        tnc.export(folder, tmp_path / "out", bits=(4, 9))
    with pytest.raises(TensorNetError, match="bf16"):
        tnc.export(folder, tmp_path / "out", nearest="bf16")
    with pytest.raises(CheckpointError, match="exists"):
        tnc.export(folder, folder)
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "dear.txt").write_text("")
    for kept in (folder, tmp_path / "letters"):
        with pytest.raises(CheckpointError, match="is kept"):
            tnc.export(folder, kept, overwrite=True)
    model = tiny_gpt2()
    compressed(model)
    with pytest.raises(TensorNetError, match="gpt2"):
        tnc.export(tnc.save(model, tmp_path / "gpt2"), tmp_path / "gpt2.gguf", to="gguf")
    assert not (tmp_path / "out").exists()
