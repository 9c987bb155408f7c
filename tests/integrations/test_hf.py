"""Saved folders through transformers' own front door."""

import copy
import json
import pickle

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, EncodecConfig, EncodecModel

import tensornet_compress as tnc
from tensornet_compress.errors import CheckpointError, TensorNetError
from tensornet_compress.files import MANIFEST, TENSORS
from tensornet_compress.nn import NetworkModule, TNLinear
from tensornet_compress.tensor import FibreOrder
from tests.architectures import inputs, sharp
from tests.files.saved import compressed, tensor_file
from tests.files.test_save_load import in_bf16
from tests.models import batches, tiny_bert, tiny_gpt2, tiny_llama, tiny_tokenizer

EMBEDDED = ["*_proj", "embed_tokens", "lm_head"]
CODED = {"method": "coded", "budget": tnc.Budget(bits_per_weight=6.5)}
UNIFORM = {"allocator": "uniform", "budget": tnc.Budget(bits_per_weight=14.0)}
CASES = {
    "tied head stays dense": (tiny_llama, {}),
    "tied head compressed": (tiny_llama, {"targets": EMBEDDED}),
    "tied head coded": (tiny_llama, CODED),
    "untied head coded": (lambda: tiny_llama(tied=False), CODED),
    "pivots": (tiny_llama, {"method": "svd", "formats": ["bf16p"], "targets": EMBEDDED} | UNIFORM),
    "trees": (tiny_llama, {"method": "tree", "formats": ["int8g64"], "allocator": "uniform"}),
    "gpt2": (tiny_gpt2, {}),
    "bert": (tiny_bert, {"targets": ["encoder.*", "word_embeddings"]}),
    "bfloat16": (lambda: in_bf16(tiny_llama()), {"targets": EMBEDDED}),
}


def answers(model):
    with torch.no_grad():
        return model(batches(1, seed=5)[0])[0]


def dtypes(model):
    return {name: tensor.dtype for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("case", CASES)
def test_from_pretrained_gives_the_saved_model_and_save_pretrained_the_folder(case, tmp_path):
    make, options = CASES[case]
    model = make()
    compressed(model, **options)
    folder = tnc.save(model, tmp_path / "saved")
    auto = AutoModelForCausalLM if model.can_generate() else AutoModel
    loaded, info = auto.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    assert type(loaded) is type(model)
    assert dtypes(loaded) == dtypes(model)
    assert torch.equal(answers(loaded), answers(model))
    assert sum(map(torch.numel, loaded.parameters())) == sum(map(torch.numel, model.parameters())), (
        "something is no longer tied"
    )
    for number, source in enumerate(
        (model, loaded, tnc.load(folder), copy.deepcopy(loaded), pickle.loads(pickle.dumps(model)))
    ):
        source.save_pretrained(tmp_path / str(number))
        for file in (TENSORS, MANIFEST, "config.json"):
            assert (tmp_path / str(number) / file).read_bytes() == (folder / file).read_bytes(), (number, file)


def test_the_dtype_that_is_asked_for_is_computed_in_and_what_is_stored_stays(tmp_path):
    model = tiny_llama()
    compressed(model, targets=EMBEDDED)
    folder = tnc.save(model, tmp_path / "saved")
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, device_map="cpu")
    assert answers(loaded).dtype == torch.bfloat16
    assert torch.nn.functional.cosine_similarity(answers(loaded).float(), answers(model), dim=-1).min() > 0.99
    networks = {name for name, module in model.named_modules() if isinstance(module, NetworkModule)}
    kept = {name: dtype for name, dtype in dtypes(model).items() if name.rpartition(".")[0] in networks}
    assert {name: dtypes(loaded)[name] for name in kept} == kept


def test_other_heads_of_the_same_model(tmp_path):
    model = tiny_llama()
    compressed(model, targets=EMBEDDED)
    body = AutoModel.from_pretrained(tnc.save(model, tmp_path / "causal"))
    assert torch.equal(answers(body), answers(model.model))
    encoder = tiny_bert()
    compressed(encoder, targets=["encoder.*"])
    classifier = AutoModelForSequenceClassification.from_pretrained(tnc.save(encoder, tmp_path / "encoder"))
    assert torch.equal(answers(classifier.bert), answers(encoder))


def test_orders_are_read(tmp_path):
    """A permuted network, whose packed order is a tensor of the file that no module holds."""
    model = tiny_llama(layers=1)
    compressed(model, targets=["up_proj"], method="tree", formats=["bf16"], **UNIFORM)
    name, layer = next(iter(model.tensornet_plan.layers.items()))
    (term,) = layer.spec.terms
    order = FibreOrder(axis=0, permutation=tuple(torch.randperm(layer.spec.shape[0]).tolist()))
    terms = (term.model_copy(update={"layout": term.layout.model_copy(update={"fibre_orders": (order,)})}),)
    spec = layer.spec.model_copy(update={"terms": terms})
    plan = model.tensornet_plan.model_copy(update={"layers": {name: layer.model_copy(update={"spec": spec})}})
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, TNLinear(spec, model.get_submodule(name).stored()))
    model.tensornet_plan = plan
    loaded, info = AutoModelForCausalLM.from_pretrained(tnc.save(model, tmp_path / "saved"), output_loading_info=True)
    assert not any(info.values())
    assert torch.equal(answers(loaded), answers(model))


def test_damaged_folders_are_refused(tmp_path):
    model = tiny_llama(layers=1)
    compressed(model)
    folder = tnc.save(model, tmp_path / "saved")
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["nbytes"] += 1
    (folder / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="is damaged"):
        AutoModelForCausalLM.from_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["format_version"] = 99
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="99"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_save_pretrained_leaves_other_files_and_refuses_other_tensors(tmp_path):
    model = tiny_llama(layers=1)
    compressed(model)
    tiny_tokenizer().save_pretrained(tmp_path / "out")
    model.save_pretrained(tmp_path / "out", state_dict=model.state_dict(), max_shard_size="1GB")
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    assert tensor_file(tmp_path / "out") == tensor_file(tnc.save(model, tmp_path / "saved"))
    with pytest.raises(TensorNetError, match="tensors other than"):
        model.save_pretrained(tmp_path / "out", state_dict={})
    with pytest.raises(TensorNetError, match=r"model\.push_to_hub"):
        model.save_pretrained(tmp_path / "out", push_to_hub=True)


def test_what_is_tied_stays_tied_when_others_tie_weights(tmp_path):
    model = tiny_llama()
    compressed(model, **CODED)
    for one in (model, tnc.load(tnc.save(model, tmp_path / "saved")), AutoModelForCausalLM.from_pretrained(tmp_path / "saved")):
        before = answers(one)
        one.tie_weights()
        assert torch.equal(answers(one), before)
        assert one.lm_head.stored().keys() == one.model.embed_tokens.stored().keys()
        assert all(part is getattr(one.lm_head, name) for name, part in one.model.embed_tokens.named_buffers())
        dense = tnc.materialize(one)
        dense.tie_weights()
        assert dense.lm_head.weight is dense.model.embed_tokens.weight


def test_a_dequantised_model_is_a_plain_one(tmp_path):
    model = tiny_llama(layers=1)
    compressed(model)
    loaded = AutoModelForCausalLM.from_pretrained(tnc.save(model, tmp_path / "saved"))
    loaded.dequantize().save_pretrained(tmp_path / "dense")
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())
    assert not (tmp_path / "dense" / MANIFEST).exists()
    assert torch.equal(answers(AutoModelForCausalLM.from_pretrained(tmp_path / "dense")), answers(loaded))


def _encodec():
    sizes = {"num_filters": 4, "upsampling_ratios": [2, 2], "hidden_size": 16, "codebook_size": 16, "codebook_dim": 16}
    torch.manual_seed(0)
    return EncodecModel(EncodecConfig(**sizes, num_lstm_layers=1, target_bandwidths=[24.0])).eval()


@pytest.mark.parametrize("name", ["Mixtral", "Gemma 3", "SigLIP", "Encodec"])
def test_split_modules_and_scaled_tables_are_read(name, tmp_path):
    """Fused experts, an embedding that scales what it looks up, attention of torch, an LSTM with weight-normed convolutions."""
    model = _encodec() if name == "Encodec" else copy.deepcopy(sharp(name))
    given = {"input_values": torch.randn(1, 1, 64)} if name == "Encodec" else inputs(name)
    tnc.compress(model, tnc.Budget(bits_per_weight=9), method="coded", allocator="energy", workers=1)
    held = {module.__class__.__name__ for module in model.modules()}
    assert held & {"SplitExperts", "TNEmbedding", "SplitAttention", "SplitRecurrent"}
    folder = tnc.save(model, tmp_path / "saved")
    loaded, info = type(model).from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    with torch.no_grad():
        for found, wanted in zip(loaded(**given).values(), model(**given).values()):
            assert not isinstance(wanted, torch.Tensor) or torch.equal(found, wanted)
    loaded.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / TENSORS).read_bytes() == (folder / TENSORS).read_bytes()


def test_another_head_on_split_modules(tmp_path):
    model = copy.deepcopy(sharp("Mixtral"))
    tnc.compress(model, tnc.Budget(bits_per_weight=9), method="dense", allocator="energy", workers=1)
    folder = tnc.save(model, tmp_path / "saved")
    body = AutoModel.from_pretrained(folder)
    given = inputs("Mixtral")
    with torch.no_grad():
        assert torch.equal(body(**given).last_hidden_state, model.model(**given).last_hidden_state)
    _, info = AutoModelForSequenceClassification.from_pretrained(folder, output_loading_info=True)
    assert info["missing_keys"] == {"score.weight"}
