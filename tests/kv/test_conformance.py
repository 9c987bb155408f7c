"""An identity codec must give the tokens of ``DynamicCache`` under everything ``transformers`` does with a cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import tensornet_compress.kv as kv
from tensornet_compress.errors import TensorNetError
from tests.kv.tiny_models import FAMILIES, VOCABULARY, generate, tiny, tiny_profile


def identity(model: Any, **options: Any) -> kv.StorageCache:
    """An exact cache that seals early and often."""
    return kv.StorageCache(model, codec=kv.IdentityCodec(), sinks=4, window=8, block=8, **options)


def exact(model: Any) -> DynamicCache:
    """The reference."""
    return DynamicCache(config=model.config)


def padded(ids: Tensor) -> Tensor:
    """A mask that pads the first row on the left."""
    mask = torch.ones_like(ids)
    mask[0, :17] = 0
    return mask


@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_with_left_padding(name: str, ids: Tensor) -> None:
    model = tiny(name)
    cache = identity(model)
    got = generate(model, ids, cache, attention_mask=padded(ids))
    assert torch.equal(got, generate(model, ids, exact(model), attention_mask=padded(ids)))
    assert cache.sealed_length >= 128
    assert cache.get_seq_length() == got.shape[1] - 1


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3},
        {"do_sample": True, "num_return_sequences": 2},
        {"prefill_chunk_size": 32},
        {"do_sample": True, "num_beams": 2, "num_return_sequences": 2},
    ],
    ids=["beams", "sampling", "chunked prefill", "beam sampling"],
)
@pytest.mark.parametrize("name", ["llama-gqa", "gemma3-hybrid"])
def test_generation_modes(name: str, options: dict[str, Any], ids: Tensor) -> None:
    model = tiny(name)
    got = generate(model, ids, identity(model), new=30, attention_mask=padded(ids), **options)
    assert torch.equal(got, generate(model, ids, exact(model), new=30, attention_mask=padded(ids), **options))


def test_prompt_lookup(ids: Tensor) -> None:
    model = tiny("llama-gqa")
    row = torch.cat([ids[:1, :40], ids[:1, :40]], 1)
    cache = identity(model)
    got = generate(model, row, cache, prompt_lookup_num_tokens=4)
    assert torch.equal(got, generate(model, row, exact(model), prompt_lookup_num_tokens=4))
    assert cache.sealed_length > 64


def test_multi_turn_with_freezing(ids: Tensor) -> None:
    model = tiny("llama-gqa")
    ours, reference = identity(model), exact(model)
    one, other = generate(model, ids, ours, new=20), generate(model, ids, reference, new=20)
    ours.freeze()
    assert ours.report().working_nbytes == 0
    following = torch.cat([one, ids[:, :15]], 1)
    assert torch.equal(one, other)
    assert torch.equal(generate(model, following, ours, new=20), generate(model, following, reference, new=20))


def test_eager_attention(ids: Tensor) -> None:
    model = tiny("llama-gqa")
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        assert torch.equal(generate(model, ids, identity(model)), generate(model, ids, exact(model)))
    finally:
        model.set_attn_implementation(before)


@torch.no_grad()
def test_one_chunk_of_new_tokens_after_sealing(ids: Tensor) -> None:
    model = tiny("llama-gqa")
    following = ids[:, :11]
    logits = []
    for cache in (identity(model), exact(model)):
        model(ids, past_key_values=cache)
        logits.append(model(following, past_key_values=cache).logits)
    torch.testing.assert_close(logits[0], logits[1], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("removed", [3, 9, 40, 88])
@torch.no_grad()
def test_crop_equals_a_shorter_history(removed: int, ids: Tensor) -> None:
    model = tiny("llama-gqa")
    cropped, short = identity(model), exact(model)
    model(ids, past_key_values=cropped)
    cropped.crop(-removed)
    assert cropped.get_seq_length() == ids.shape[1] - removed
    model(ids[:, :-removed], past_key_values=short)
    following = torch.randint(1, VOCABULARY, (2, 70), generator=torch.Generator().manual_seed(5))
    for token in (following[:, :30], following[:, 30:]):
        got, wanted = (model(token, past_key_values=cache).logits for cache in (cropped, short))
        torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("mode", ["storage", "live"])
@torch.no_grad()
def test_batch_operations_act_on_rows(mode: str, ids: Tensor) -> None:
    model, profile = tiny("llama-gqa"), tiny_profile("llama-gqa")
    long = torch.cat([ids, ids.flip(0)], 1)

    def filled() -> kv.CompressedCache:
        cache = kv.CompressedCache(model, bits=3.0, profile=profile, mode=mode, block=64)
        model(long, past_key_values=cache)
        return cache

    following = torch.randint(1, VOCABULARY, (4, 5), generator=torch.Generator().manual_seed(6))
    plain = filled()
    rows = model(following[:2], past_key_values=plain).logits
    swapped = filled()
    swapped.reorder_cache(torch.tensor([1, 0]))
    torch.testing.assert_close(model(following[:2].flip(0), past_key_values=swapped).logits, rows.flip(0))
    selected = filled()
    selected.batch_select_indices(torch.tensor([1]))
    torch.testing.assert_close(model(following[1:2], past_key_values=selected).logits, rows[1:2], atol=1e-5, rtol=1e-4)
    repeated = filled()
    repeated.batch_repeat_interleave(2)
    doubled = model(following[:2].repeat_interleave(2, 0), past_key_values=repeated).logits
    torch.testing.assert_close(doubled, rows.repeat_interleave(2, 0), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("mode", ["storage", "live"])
@pytest.mark.parametrize("sinks", [0, 4])
@torch.no_grad()
def test_batch_operations_before_anything_is_sealed(mode: str, sinks: int, ids: Tensor) -> None:
    model = tiny("llama-gqa")
    cache = kv.CompressedCache(model, bits=8.0, profile=tiny_profile("llama-gqa"), mode=mode, block=64, sinks=sinks)
    reference = exact(model)
    for past in (cache, reference):
        model(ids, past_key_values=past)
        past.batch_repeat_interleave(2)
        past.reorder_cache(torch.tensor([3, 0, 1, 2]))
        past.batch_select_indices(torch.tensor([0, 2, 3]))
    following = torch.randint(1, VOCABULARY, (3, 100), generator=torch.Generator().manual_seed(7))
    for part in following.split(50, 1):
        got, wanted = (model(part, past_key_values=past).logits.log_softmax(-1) for past in (cache, reference))
    assert cache.report().sealed_tokens > 0
    assert (wanted.exp() * (wanted - got)).sum(-1).mean() < 2e-4


@pytest.mark.parametrize("mode", ["storage", "live"])
@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_fine_codes_come_close_in_every_family(name: str, mode: str, ids: Tensor) -> None:
    model = tiny(name)
    long = torch.cat([ids, ids.flip(0)], 1)
    ours = kv.CompressedCache(model, bits=8.0, profile=tiny_profile(name), mode=mode, block=64)
    reference = exact(model)
    for cache in (ours, reference):
        model(long, past_key_values=cache)
    assert ours.report().sealed_tokens > 0
    got, wanted = (model(ids[:, :6], past_key_values=cache).logits.log_softmax(-1) for cache in (ours, reference))
    assert (wanted.exp() * (wanted - got)).sum(-1).mean() < 2e-4


@pytest.mark.parametrize("mode", ["storage", "live"])
def test_reset_gives_a_fresh_cache(mode: str, ids: Tensor) -> None:
    model = tiny("llama-gqa")
    cache = kv.CompressedCache(model, bits=3.0, profile=tiny_profile("llama-gqa"), mode=mode, block=64)
    first = generate(model, torch.cat([ids, ids], 1), cache)
    cache.reset()
    assert cache.get_seq_length() == 0
    assert cache.nbytes == 0
    assert torch.equal(generate(model, torch.cat([ids, ids], 1), cache), first)


@pytest.mark.parametrize("mode", ["storage", "live"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models(mode: str, dtype: torch.dtype, ids: Tensor) -> None:
    model = FAMILIES["llama-gqa"]().eval().to(dtype)
    cache = kv.CompressedCache(model, bits=8.0, profile=tiny_profile("llama-gqa"), mode=mode, block=64)
    generate(model, torch.cat([ids, ids], 1), cache, new=20)
    assert cache.layers[0].keys.dtype == dtype
    assert cache.report().sealed_tokens > 0


@pytest.mark.parametrize("mode", ["storage", "live"])
def test_offload_and_prefetch_keep_the_answers(mode: str, ids: Tensor) -> None:
    model = tiny("llama-gqa")
    long = torch.cat([ids, ids], 1)
    caches = [kv.CompressedCache(model, bits=3.0, profile=tiny_profile("llama-gqa"), mode=mode, block=64) for _ in range(2)]
    with torch.no_grad():
        for cache in caches:
            model(long, past_key_values=cache)
        for layer in caches[0].layers:
            layer.offload()
            layer.prefetch()
        first, second = (model(ids[:, :3], past_key_values=cache).logits for cache in caches)
    assert torch.equal(first, second)


def test_another_models_positions_are_refused(ids: Tensor) -> None:
    cache = identity(tiny("llama-gqa"))
    with pytest.raises(TensorNetError, match="only with the model it was made for"):
        tiny("qwen3")(ids, past_key_values=cache)


def test_hybrid_layers_are_reported() -> None:
    report = identity(tiny("gemma3-hybrid")).report()
    assert report.skipped == ((0, "DynamicSlidingWindowLayer"), (2, "DynamicSlidingWindowLayer"))


def test_the_mode_may_be_given_by_position():
    model = tiny("llama-gqa")
    assert isinstance(kv.CompressedCache(model, 4.0, None, "storage"), kv.StorageCache)
    assert isinstance(kv.CompressedCache(model, 4.0), kv.LiveCache)
    with pytest.raises(TensorNetError, match="mode must be 'live' or 'storage', was given 'x'"):
        kv.CompressedCache(model, 4.0, None, "x")
