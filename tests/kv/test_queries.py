"""Queries are heard as attention meets them, and their metric is the mean squared change of scores."""

from __future__ import annotations

import copy

import pytest
import torch

pytest.importorskip("transformers")

from transformers.cache_utils import DynamicCache, EncoderDecoderCache

import tensornet_compress.kv as kv
from tensornet_compress.errors import TensorNetError
from tensornet_compress.kv.profile.capture import Runner, Window
from tensornet_compress.kv.profile.moments import QueryMoments
from tests.kv.tiny_models import FAMILIES, VOCABULARY, strong, tiny

TOKENS = 64


def ids(seed: int = 0) -> torch.Tensor:
    return torch.randint(1, VOCABULARY, (1, TOKENS), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", FAMILIES)
def test_queries_and_keys_give_the_models_attention(name: str) -> None:
    model = tiny(name)
    before = model.config._attn_implementation
    with Runner(model) as runner:
        captured = next(iter(runner.capture(Window(ids(), torch.ones_like(ids())), queries=True)))
        rotary = runner.rotary()
    assert model.config._attn_implementation == before
    model.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            wanted = model(ids(), output_attentions=True).attentions
    finally:
        model.set_attn_implementation(before)
    positions = torch.arange(TOKENS)
    for place, layer in enumerate(captured.layers):
        queries, keys = captured.queries[place], captured.keys[place]
        if rotary is not None:
            queries, keys = rotary.rotate(queries, positions), rotary.rotate(keys, positions)
        scores = queries @ keys.repeat_interleave(len(queries) // len(keys), 0).mT * captured.scaling[place]
        found = scores.masked_fill(~torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril(), -torch.inf).softmax(-1)
        torch.testing.assert_close(found, wanted[layer][0], atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("name", ["llama-gqa", "gpt2"])
def test_metric_is_the_mean_squared_change_of_scores(name: str) -> None:
    with Runner(tiny(name)) as runner:
        captured = next(iter(runner.capture(Window(ids(), torch.ones_like(ids())), queries=True)))
        rotary = runner.rotary()
    heads, width = [len(k) for k in captured.keys], captured.keys[0].shape[-1]
    moments = QueryMoments(sum(heads), width)
    moments.add(captured.queries, captured.scaling, heads)
    equal = torch.ones(sum(heads), dtype=torch.float64)
    metric, values = moments.metric(equal, width, heads, rotary, TOKENS, ridge=0.0)
    error = torch.randn(width, generator=torch.Generator().manual_seed(3))
    group = len(captured.queries[0]) // heads[0]
    torch.testing.assert_close(values[0], group * torch.eye(width, dtype=torch.float64))
    # Every query at every distance below the length, short ones as often as causal pairs have them.
    total, pairs = 0.0, 0
    for distance in range(TOKENS):
        queries = captured.queries[0][:group]
        met = queries if rotary is None else rotary.rotate(queries, torch.full((TOKENS,), distance))
        squared = (captured.scaling[0] * met @ error).square().sum(0).mean()
        total, pairs = total + float(squared) * (TOKENS - distance), pairs + TOKENS - distance
    assert float(error.double() @ metric[0] @ error.double()) == pytest.approx(total / pairs, rel=0.03)


def test_calibrating_by_queries_needs_no_gradient_and_is_deterministic() -> None:
    model = tiny("llama-gqa")
    batches = [ids(seed) for seed in range(6)]
    with torch.inference_mode():
        first = kv.calibrate(model, batches, metric="queries", group_size=3, joined=4)
    second = kv.calibrate(model, batches, metric="queries", group_size=3, joined=4)
    assert first.spec == second.spec
    assert first.spec.metric == "queries"
    for side in ("key", "value"):
        assert torch.equal(first.trees[side].metric_root, second.trees[side].metric_root)


@pytest.mark.parametrize("name", ["latent attention", "own attention"])
def test_where_queries_do_not_meet_keys_gradients_are_those_of_all_attention_outputs(name: str) -> None:
    model, text = strong(name), ids()
    place, error = 10, 1e-3 * torch.randn(1, generator=torch.Generator().manual_seed(1))

    def outputs(side: int | None) -> torch.Tensor:
        """What the first attention that caches gives, with an error at one channel of one of its keys or values."""
        cache, given = DynamicCache(config=model.config), []
        plain = cache.update

        def update(keys, values, layer, *args, **kwargs):
            held = [part.clone() for part in plain(keys, values, layer, *args, **kwargs)]
            if layer == first and side is not None:
                held[side][0, 0, place, 3] += error[0]
            return tuple(held)

        cache.update = update
        attention = next(m for n, m in model.named_modules() if n.endswith(("self_attn", "self_attention")) and cached(m))
        handle = attention.register_forward_hook(lambda _m, _i, output: given.append(output[0].double()))
        with torch.no_grad():
            model(text, past_key_values=cache)
        handle.remove()
        return given[0]

    def cached(module: torch.nn.Module) -> bool:
        return module.layer_idx == first

    with Runner(model) as runner:
        runner.style = None  # gradients as they are, with rotary positions on
        window = Window(ids(), torch.ones_like(ids()))
        seen = [next(iter(runner.capture(window, queries=True))) for _ in range(150)]
    first = seen[0].layers[0]
    for side in (0, 1):
        moved = float(((outputs(side) - outputs(None)) / error.double()).square().sum())
        squared = torch.stack([captured.felt[0][side][0, place, 3].double().square() for captured in seen])
        assert float(squared.mean()) == pytest.approx(moved, rel=0.4)
        assert moved > 0


def test_calibrating_a_decoder_behind_an_encoder() -> None:
    model = copy.deepcopy(strong("encoder-decoder"))
    for name, parameter in model.named_parameters():
        parameter.data /= 3 if "Attention" in name and parameter.ndim > 1 else 1
    batches = [
        {"input_ids": ids(seed), "decoder_input_ids": torch.cat([ids(seed + 9), ids(seed + 19)], 1)} for seed in range(6)
    ]
    for metric in ("queries", "fisher"):
        with torch.inference_mode():
            profile = kv.calibrate(model, batches, metric=metric, group_size=2, joined=4, sensitivity_windows=3)
        assert (profile.spec.layers, profile.spec.heads, profile.spec.metric) == ([0, 1], [4, 4], metric)
        cache = EncoderDecoderCache(kv.CompressedCache(model, bits=8.0, profile=profile, window=16), DynamicCache())
        exact = EncoderDecoderCache(DynamicCache(), DynamicCache())
        asked = {"input_ids": ids(7), "decoder_input_ids": torch.cat([ids(8), ids(9)[:, :32]], 1)}
        with torch.no_grad():
            for past in (cache, exact):
                model(**asked, past_key_values=past)
            asked["decoder_input_ids"] = ids(3)[:, :1]
            then = [model(**asked, past_key_values=past).logits for past in (cache, exact)]
        assert cache.self_attention_cache.report().sealed_tokens == 64
        assert float((then[0] - then[1]).norm() / then[1].norm()) < 0.05
    with pytest.raises(TensorNetError, match=r"integer decoder_input_ids .* beside what the encoder reads"):
        kv.calibrate(model, [ids()], metric="queries")
