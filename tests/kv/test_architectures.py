"""Whatever a model does with its cache, scores are those of an exact one (up to the codes), or the cache is refused."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig
from transformers.cache_utils import EncoderDecoderCache, LinearAttentionLayer

import tensornet_compress.kv as kv
from tensornet_compress.errors import TensorNetError
from tests.kv.tiny_models import ARCHITECTURES, FAMILIES, VOCABULARY, strong, tiny, tiny_profile

DECODERS = [name for name in ARCHITECTURES if name != "encoder-decoder"]
MODES = ("live", "storage")


def prompt(length: int, batch: int = 1) -> Tensor:
    return torch.randint(1, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def scores(model: Any, past: Any, steps: int = 4, length: int = 330, chunk: int = 5) -> Tensor:
    """Logits of single tokens, then of a chunk of several, read after a prompt."""
    ids = prompt(length + steps + chunk)
    model(ids[:, :length], past_key_values=past)
    parts = [*ids[:, length : length + steps].split(1, 1), ids[:, length + steps :]]
    return torch.cat([model(part, past_key_values=past).logits for part in parts if part.shape[1]], 1)


@pytest.mark.filterwarnings("ignore:the attention of this model does not contract")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", [*DECODERS, "llama-gqa", "gemma3-hybrid"])
def test_scores_are_those_of_an_exact_cache(name: str, mode: str) -> None:
    model = strong(name)
    exact = scores(model, DynamicCache(config=model.config))
    cache = kv.CompressedCache(model, bits=8.0, mode=mode)
    torch.testing.assert_close(scores(model, cache), exact, atol=0.01, rtol=0)
    assert cache.report().sealed_tokens >= 256


def test_a_compiled_model_reads_them() -> None:
    config = copy.deepcopy(tiny("llama-mqa").config)
    config.num_hidden_layers = 1
    model = type(tiny("llama-mqa"))(config).eval()
    exact, cache = scores(model, DynamicCache(config=model.config), 2, chunk=0), kv.CompressedCache(model, bits=8.0)
    try:
        found = scores(torch.compile(model, dynamic=True, backend="eager"), cache, 2, chunk=0)
    finally:
        torch.compiler.reset()
    torch.testing.assert_close(found, exact, atol=0.01, rtol=0)
    assert cache.report().sealed_tokens >= 256


@pytest.mark.parametrize("name", ["latent attention", "attention sinks", "soft cap", "own attention"])
def test_a_rebuilt_cache_says_so_once_a_step_is_slow(name: str) -> None:
    with pytest.warns(UserWarning, match="does not contract"):
        scores(strong(name), kv.CompressedCache(strong(name), bits=8.0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scores(strong(name), kv.CompressedCache(strong(name), bits=8.0, attention="rebuild"))
        scores(strong("llama-gqa"), kv.CompressedCache(strong("llama-gqa"), bits=8.0))


@pytest.mark.parametrize("name", [*DECODERS, "llama-gqa"])
def test_nothing_changes_before_anything_is_coded(name: str) -> None:
    model = strong(name)
    options = {"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    exact = model.generate(prompt(20), pad_token_id=0, **options)
    for mode in MODES:
        with kv.compressed(model, bits=3.0, mode=mode) as caches:
            found = model.generate(prompt(20), pad_token_id=0, **options)
        assert len(caches) == 1
        assert torch.equal(torch.stack(found.logits), torch.stack(exact.logits))


def test_layers_of_linear_attention_keep_their_class() -> None:
    model = strong("linear and full")
    cache = kv.CompressedCache(model, bits=8.0)
    scores(model, cache)
    report = cache.report()
    assert [type(layer) for layer in cache.layers[:2]] == [LinearAttentionLayer] * 2
    assert report.skipped == ((0, "LinearAttentionLayer"), (1, "LinearAttentionLayer"))
    states = [state for layer in cache.layers[:2] for state in (*layer.conv_states.values(), *layer.recurrent_states.values())]
    assert report.other_nbytes == sum(state.nbytes for state in states) > 0
    with pytest.raises(TensorNetError, match="layer 0 is a LinearAttentionLayer, whose state cannot be saved"):
        cache.save("nowhere")


@pytest.mark.parametrize("mode", MODES)
def test_an_encoder_decoder_keeps_what_it_caches_of_its_encoder(mode: str) -> None:
    model = strong("encoder-decoder")
    options = {"max_new_tokens": 200, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    exact = model.generate(prompt(40), **options)
    with kv.compressed(model, bits=8.0, mode=mode) as caches:
        found = model.generate(prompt(40), **options)
    assert caches[0].report().sealed_tokens >= 128
    torch.testing.assert_close(torch.stack(found.logits)[:100], torch.stack(exact.logits)[:100], atol=0.03, rtol=0)
    pair = EncoderDecoderCache(kv.CompressedCache(model, bits=8.0, mode=mode), DynamicCache())
    again = model.generate(prompt(40), past_key_values=pair, **options)
    assert torch.equal(again.sequences, found.sequences)


def test_one_cache_for_decoder_and_encoder_is_refused() -> None:
    model = strong("encoder-decoder")
    with pytest.raises(TensorNetError, match="pass past_key_values=EncoderDecoderCache"):
        model.generate(prompt(40), past_key_values=kv.CompressedCache(model), max_new_tokens=3)


def test_a_generation_without_cache_gets_none() -> None:
    model = tiny("llama-gqa")
    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    exact = model.generate(prompt(200), use_cache=False, **options)
    with kv.compressed(model, bits=1.0) as caches:
        assert torch.equal(model.generate(prompt(200), use_cache=False, **options), exact)
        model.generate(prompt(20), GenerationConfig(use_cache=False, **options))
        model.generate(prompt(20), generation_config=GenerationConfig(use_cache=False, **options))
        assert not caches
        model.generate(prompt(20), GenerationConfig(use_cache=False, **options), use_cache=True)
        assert len(caches) == 1


@pytest.mark.parametrize("calibrated", [True, False])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["llama-gqa", "gpt2"])
def test_caches_work_under_autocast(name: str, mode: str, calibrated: bool) -> None:
    model = tiny(name)
    cache = kv.CompressedCache(model, 8.0, tiny_profile(name) if calibrated else None, mode)
    with torch.autocast("cpu", torch.bfloat16):
        exact = scores(model, DynamicCache(config=model.config))
        found = scores(model, cache)
    assert cache.report().sealed_tokens >= 256
    torch.testing.assert_close(found, exact, atol=0.02, rtol=0)


@pytest.mark.parametrize("calibrated", [True, False])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["llama-gqa", "gemma3-hybrid"])
def test_a_copied_cache_is_one_of_its_own(name: str, mode: str, calibrated: bool) -> None:
    """The copy, the original and a cache that never was copied give the same scores, in any order, also when one goes first."""
    model, profile = tiny(name), tiny_profile(name) if calibrated else None
    ids, following, other = prompt(200, 2), prompt(180, 2).flip(1), prompt(90, 2).flip(0)
    mask = torch.ones(2, 200, dtype=torch.int64)
    mask[0, :7] = 0
    positions = (mask.cumsum(1) - 1).clamp_min(0)

    @torch.no_grad()
    def filled() -> kv.CompressedCache:
        cache = kv.CompressedCache(model, 3.0, profile, mode, block=64)
        model(ids, attention_mask=mask, position_ids=positions, past_key_values=cache)
        return cache

    @torch.no_grad()
    def read(cache: kv.CompressedCache, more: Tensor) -> Tensor:
        places = positions[:, -1:] + 1 + torch.arange(more.shape[1])
        seen = torch.cat([mask, torch.ones_like(more)], 1)
        return model(more, attention_mask=seen, position_ids=places, past_key_values=cache).logits

    wanted, wanted_other = read(filled(), following), read(filled(), other)
    original = filled()
    first, second = copy.deepcopy(original), copy.deepcopy(original)
    assert str(first.report()) == str(original.report())
    assert torch.equal(read(first, other), wanted_other)
    assert torch.equal(read(original, following), wanted)
    del original
    assert torch.equal(read(second, following), wanted)
    assert second.profile is profile


@pytest.mark.parametrize("name", FAMILIES)
def test_an_empty_cache_can_be_copied(name: str) -> None:
    model = tiny(name)
    caches = [kv.CompressedCache(model, 8.0, mode=mode) for mode in MODES]
    for cache in caches:
        copied = copy.deepcopy(cache)
        assert torch.equal(scores(model, copied, length=150), scores(model, cache, length=150))
