"""Rotary positions come off exactly, in the pairing that each family uses."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from tensornet_compress.errors import TensorNetError
from tensornet_compress.kv.rope import PositionRecorder, Rotary, rotary_module, rotary_style
from tests.kv.tiny_models import FAMILIES, tiny

STYLES = dict.fromkeys(FAMILIES, "half") | {"gpt2": None, "cohere-interleaved": "interleaved"}


@pytest.mark.parametrize("name", FAMILIES)
def test_style_is_measured(name: str) -> None:
    assert rotary_style(tiny(name)) == STYLES[name]


@pytest.mark.parametrize("name", [name for name, style in STYLES.items() if style])
@torch.no_grad()
def test_first_layer_keys_of_one_token_agree_without_positions(name: str) -> None:
    model = tiny(name)
    module, style = rotary_module(model), rotary_style(model)
    assert module is not None
    assert style is not None
    recorder = PositionRecorder(module)
    cache = DynamicCache()
    model(torch.full((1, 20), 5), past_key_values=cache)
    kinds = getattr(model.config, "layer_types", None) or ["full_attention"]
    rotary = recorder.rotary(style, kinds[0])
    keys = rotary.unrotate(cache.layers[0].keys, recorder.positions(20))
    recorder.close()
    torch.testing.assert_close(keys, keys[:, :, :1].expand_as(keys), atol=2e-5, rtol=1e-4)
    assert (cache.layers[0].keys - cache.layers[0].keys[:, :, :1]).abs().max() > 1e-2


@pytest.mark.parametrize("style", ["half", "interleaved"])
def test_rotation_is_orthogonal_and_composes(style: str) -> None:
    rotary = Rotary(torch.tensor([1.0, 0.3, 0.01]), style)  # type: ignore[arg-type]
    states = torch.randn(2, 7, 8)
    positions = torch.tensor([0, 1, 5, 100, 2000, 3, 9])
    turned = rotary.rotate(states, positions)
    torch.testing.assert_close(rotary.unrotate(turned, positions), states, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(turned.norm(dim=-1), states.norm(dim=-1))
    torch.testing.assert_close(
        rotary.rotate(rotary.rotate(states, positions), positions), rotary.rotate(states, 2 * positions), atol=2e-3, rtol=1e-3
    )
    assert torch.equal(turned[..., 6:], states[..., 6:])


def test_recorder_refuses_a_wrong_length_and_leaves_no_hook() -> None:
    model = tiny("llama-gqa")
    module = rotary_module(model)
    assert module is not None
    before = len(module._forward_pre_hooks)
    recorder = PositionRecorder(module)
    model(torch.ones(1, 5, dtype=torch.int64))
    assert recorder.positions(5).tolist() == [[0, 1, 2, 3, 4]]
    with pytest.raises(TensorNetError, match="received 6 tokens"):
        recorder.positions(6)
    recorder.close()
    assert len(module._forward_pre_hooks) == before
