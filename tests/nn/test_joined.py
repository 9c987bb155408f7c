"""Dense again, modules that were split are what they were, with the state that others read."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

import tensornet_compress as tnc
from tensornet_compress.calibrate.batches import kept_output, model_inputs
from tensornet_compress.errors import CheckpointError, TargetError
from tests.architectures import inputs, sharp

BUDGET = tnc.Budget(bits_per_weight=9)


def answer(model, name):
    with torch.no_grad():
        return kept_output(model, model_inputs(inputs(name), torch.device("cpu")))[0]


@pytest.mark.parametrize("name", ["Mixtral", "Llama 4", "JetMoE", "GPT-OSS", "SigLIP"])
def test_a_materialised_model_is_read_by_transformers(name, tmp_path):
    model = copy.deepcopy(sharp(name))
    kinds = {place: type(module) for place, module in model.named_modules()}
    tnc.compress(model, BUDGET, [inputs(name)], workers=1, method="coded")
    wanted = answer(model, name)
    tnc.save(model, tmp_path / "saved")
    tnc.materialize(model)
    assert {place: type(module) for place, module in model.named_modules()} == kinds
    assert model.state_dict().keys() == sharp(name).state_dict().keys()
    torch.testing.assert_close(answer(model, name), wanted, rtol=1e-3, atol=1e-3 * float(wanted.abs().max()))
    model.save_pretrained(tmp_path / "dense")
    tnc.export(tmp_path / "saved", tmp_path / "exported", to="dense")
    for folder in ("dense", "exported"):
        again, told = type(model).from_pretrained(tmp_path / folder, output_loading_info=True)
        assert not told["missing_keys"]
        torch.testing.assert_close(answer(again.eval(), name), answer(model, name), rtol=1e-3, atol=1e-4)


PLAIN = {
    "attention": (lambda: nn.MultiheadAttention(16, 4), lambda x: (x, x, x)),
    "attention of other widths": (lambda: nn.MultiheadAttention(16, 4, kdim=16, vdim=16, bias=False), lambda x: (x, x, x)),
    "lstm": (lambda: nn.LSTM(16, 8, 2, bidirectional=True), lambda x: (x,)),
    "gru without bias": (lambda: nn.GRU(16, 8, bias=False), lambda x: (x,)),
    "bilinear": (lambda: nn.Bilinear(16, 16, 8), lambda x: (x, x)),
    "bag": (lambda: nn.EmbeddingBag(20, 8), lambda x: (x.abs().mul(3).long().clamp(0, 19)[0],)),
}


@pytest.mark.parametrize("case", PLAIN)
def test_modules_of_torch_are_joined(case):
    class Holder(nn.Module):
        def __init__(self):
            super().__init__()
            self.part = make()

        def forward(self, x):
            out = self.part(*given(x))
            return out[0] if isinstance(out, tuple) else out

    make, given = PLAIN[case]
    torch.manual_seed(0)
    model, x = Holder().eval(), torch.randn(5, 3, 16)
    state, before = copy.deepcopy(model.state_dict()), model(x)
    tnc.compress(model, tnc.Budget(bits_per_weight=12), [[x]], method="dense", targets=["*"], workers=1)
    compressed = model(x)
    tnc.materialize(model)
    assert type(model.part) is type(make())
    assert {name: tensor.shape for name, tensor in model.state_dict().items()} == {n: t.shape for n, t in state.items()}
    torch.testing.assert_close(model(x), compressed, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(model(x), before, rtol=0.1, atol=0.02)
    model.load_state_dict(state)
    torch.testing.assert_close(model(x), before)


def test_weights_that_were_computed_are_not_saved_by_transformers_once_dense(tmp_path):
    name = "wav2vec 2.0"
    model = copy.deepcopy(sharp(name))
    tnc.compress(model, BUDGET, [inputs(name)], workers=1, method="coded")
    tnc.save(model, tmp_path / "saved")
    tnc.materialize(model)
    with pytest.raises(CheckpointError, match="weight_norm"):
        model.save_pretrained(tmp_path / "dense")
    with pytest.raises(CheckpointError, match="weight_norm"):
        tnc.export(tmp_path / "saved", tmp_path / "exported", to="dense")
    assert not (tmp_path / "dense").exists()


def compressed(model, x):
    tnc.compress(model, tnc.Budget(bits_per_weight=9), [[x]], method="dense", workers=1)
    return model


def test_hooks_stay_and_their_handles_still_take_them_off():
    model, x = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32)), torch.randn(4, 32)
    plain = copy.deepcopy(model)
    first = model[0].register_forward_hook(lambda _module, _given, out: out * 3)
    second = model[1].register_forward_pre_hook(lambda _module, given: (given[0] + 1,))
    wanted = model(x)
    compressed(model, x)
    torch.testing.assert_close(model(x), wanted, rtol=0.05, atol=0.05)
    first.remove(), second.remove()
    torch.testing.assert_close(model(x), plain(x), rtol=0.05, atol=0.05)


def test_layers_whose_forward_was_replaced_or_that_hold_buffers_are_left_alone():
    model, x = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 32)), torch.randn(4, 32)
    plain = model[0].forward
    model[0].forward = lambda given: plain(given) * 3
    model[1].register_buffer("mask", torch.ones(32))
    wanted = model(x)
    report = tnc.compress(model, tnc.Budget(bits_per_weight=9), [[x]], method="dense", workers=1)
    reasons = {skip["name"]: skip["reason"] for skip in report.skipped}
    assert "forward was replaced" in reasons["0"]
    assert "buffers of its own (mask)" in reasons["1"]
    torch.testing.assert_close(model(x), wanted, rtol=0.05, atol=0.05)


def test_attributes_of_a_layer_and_calls_by_keyword_stay(tmp_path):
    class Holder(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.table = nn.Linear(32, 32), nn.Embedding(32, 32)
            self.layer.gain = 3.0

        def forward(self, ids):
            return self.layer(input=self.table(input=ids)) * self.layer.gain

    model, ids = Holder(), torch.arange(32)[None]
    wanted = model(ids)
    compressed(model, ids)
    torch.testing.assert_close(model(ids), wanted, rtol=0.05, atol=0.05)
    again = tnc.load(tnc.save(model, tmp_path / "saved"), model=Holder())
    torch.testing.assert_close(again(ids), model(ids))


def test_adapters_are_not_merged_into_a_network():
    peft = pytest.importorskip("peft")
    base = copy.deepcopy(sharp("Llama"))
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = peft.get_peft_model(base, config).eval()
    tnc.compress(model, tnc.Budget(bits_per_weight=10), [inputs("Llama")], method="dense", workers=1)
    wanted = answer(model, "Llama")
    with pytest.raises(TargetError, match=r"tnc\.materialize\(model\) before merging"):
        model.merge_and_unload()
    tnc.materialize(model)
    merged = model.merge_and_unload()
    torch.testing.assert_close(answer(merged, "Llama"), wanted, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: torch.jit.script(nn.Sequential(nn.Linear(8, 8))), "scripted or traced"),
        (lambda: nn.Sequential(nn.LazyLinear(8)), "has no shape yet"),
        (lambda: inference(), "torch.inference_mode"),
    ],
)
def test_models_that_cannot_be_changed_are_refused(make, why):
    with pytest.raises(TargetError, match=why):
        tnc.compress(make(), tnc.Budget(bits_per_weight=8), [[torch.randn(2, 8)]], workers=1)


def inference():
    with torch.inference_mode():
        return nn.Sequential(nn.Linear(8, 8))


def test_weight_norm_of_torch_alone_is_dense_afterwards():
    model, x = nn.Sequential(weight_norm(nn.Linear(32, 32))), torch.randn(4, 32)
    wanted = model(x)
    tnc.materialize(compressed(model, x))
    torch.testing.assert_close(model(x), wanted, rtol=0.05, atol=0.05)
