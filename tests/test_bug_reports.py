"""What public reports on other packages showed to be wrong here, too; docs/bug-reports.md tells of all that were tried."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

import tensornet_compress as tnc
import tensornet_compress.kv as kv
from tests.architectures import ids, inputs, sharp

NINE = tnc.Budget(bits_per_weight=9)


def _error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / (wanted.double() - wanted.double().mean()).norm())


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("targets", [["*linear1", "*linear2"], ["*self_attn*"]])
def test_encoders_of_torch_read_padded_batches(targets: list[str]) -> None:
    """bitsandbytes 963: they take the weights of their attention without calling it, and hand on nested tensors."""
    torch.manual_seed(0)
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 24, batch_first=True), 2).eval()
    batch = {"src": torch.randn(3, 7, 16), "src_key_padding_mask": torch.arange(7) >= torch.tensor([[5], [7], [3]])}
    wanted = model(**batch)
    report = tnc.compress(model, NINE, [batch], targets=targets, workers=1)
    assert not [layer for layer in report.layers if layer.note]
    assert model.use_nested_tensor
    assert _error(model(**batch), wanted) < 0.02
    with torch.enable_grad():
        assert _error(model(**batch)[~batch["src_key_padding_mask"]], wanted[~batch["src_key_padding_mask"]]) < 0.02


def test_layers_that_stay_in_floating_point_are_not_drawn_anew(tmp_path) -> None:
    """transformers 36254 (T5 in half precision): the attention of T5 draws the weights of its parts while a model is loaded."""
    model = copy.deepcopy(sharp("T5")).to(torch.bfloat16)
    tnc.compress(model, tnc.Budget(bits_per_weight=16), method="dense", allocator="energy", workers=1)
    kept = [name for name, layer in model.tensornet_plan.layers.items() if name.endswith("SelfAttention.q")]
    assert kept
    tnc.save(model, tmp_path / "saved")
    loaded = type(model).from_pretrained(tmp_path / "saved")
    with torch.no_grad():
        assert torch.equal(loaded(**inputs("T5")).logits, model(**inputs("T5")).logits)


def test_too_little_calibration_is_told_of() -> None:
    """AutoGPTQ 708: a second moment of a few tokens knows nothing of most directions."""
    few = tnc.compress(copy.deepcopy(sharp("OPT")), NINE, [ids(1, 20)], targets=["*fc1"], workers=1)
    assert any("calibration has 20 tokens for layers of up to 32 inputs" in note for note in few.notes)
    enough = tnc.compress(copy.deepcopy(sharp("OPT")), NINE, [ids(2, 20)], targets=["*fc1"], workers=1)
    assert not any("tokens for layers" in note for note in enough.notes)


@pytest.mark.parametrize("mode", ["live", "storage"])
def test_assisted_decoding_of_an_encoder_decoder(mode: str) -> None:
    """transformers 31166 (Whisper): rejected tokens are cropped from what the decoder cached of itself."""
    model, text = sharp("BART"), ids(1, 150)
    asked = {"input_ids": ids(1, 20), "decoder_input_ids": torch.cat([text, text[:, :40]], 1), "prompt_lookup_num_tokens": 3}
    wanted = model.generate(**asked, max_new_tokens=8, do_sample=False)
    with kv.compressed(model, bits=8.0, mode=mode) as caches:
        assert torch.equal(model.generate(**asked, max_new_tokens=8, do_sample=False), wanted)
    assert caches[0].report().sealed_tokens >= 64
