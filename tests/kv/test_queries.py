"""Queries are heard as attention meets them, and their metric is the mean squared change of scores."""

from __future__ import annotations

import pytest
import torch

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
def test_a_model_that_shows_no_queries_is_refused(name: str) -> None:
    with pytest.raises(TensorNetError, match="shows no queries that meet its cached keys"):
        kv.calibrate(strong(name), [ids(seed) for seed in range(5)], metric="queries")
