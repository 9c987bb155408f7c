"""Live codes: contraction equals rebuilding, allocation meets its budget, no global state is left behind."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import tensornet_compress.kv as kv
from tensornet_compress.coding.planes import Planes
from tensornet_compress.errors import TensorNetError
from tensornet_compress.kv.live.attention import NAME, attend, contracting
from tensornet_compress.kv.live.codec import ALLOWED, Curve, SideCode, allocate
from tensornet_compress.kv.live.layer import LiveView
from tensornet_compress.kv.storage.sequence_codec import own_basis
from tests.kv.tiny_models import FAMILIES, generate, tiny, tiny_profile


def view_of(keys: Tensor, values: Tensor, bits: float, first: list[int]) -> LiveView:
    """Codes of states (batch, heads, tokens, width), with two exact sinks a row."""
    codes = []
    for states in (keys, values):
        basis, curve = own_basis(states)
        codes.append(SideCode(basis, allocate(basis.deviation, curve, bits), curve, states.shape[1]))
    index = torch.tensor(first)[:, None] + torch.arange(2)
    wide = index[:, None, :, None].expand(-1, keys.shape[1], -1, keys.shape[3])
    packed = [Planes((c.encode(s[:, :, :64]), c.encode(s[:, :, 64:]))) for c, s in zip(codes, (keys, values))]
    return LiveView(
        codes[0], codes[1], packed[0], packed[1], keys.shape[2],
        keys.gather(2, wide), values.gather(2, wide), index,
    )  # fmt: skip


@pytest.mark.parametrize("masked", ["none", "boolean", "additive"])
@pytest.mark.parametrize("new", [1, 5])
def test_contraction_equals_attention_over_rebuilt_states(masked: str, new: int) -> None:
    torch.manual_seed(0)
    keys, values = (torch.randn(2, 2, 192, 16) * torch.linspace(0.1, 2, 16) for _ in range(2))
    view = view_of(keys, values, 3.0, [7, 0])
    tail = [torch.randn(2, 2, 20, 16) for _ in range(2)]
    query = torch.randn(2, 6, new, 16)
    visible = torch.ones(2, 1, new, 212, dtype=torch.bool).tril(212 - new)
    visible[0, ..., :7] = False
    additive = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)
    mask = {"none": None, "boolean": visible, "additive": additive}[masked]
    got = attend(query, *tail, view, mask)
    whole = [torch.cat([a, b], 2).repeat_interleave(3, 1) for a, b in zip(view.rebuild(torch.float32), tail)]
    causal = torch.ones(new, 212, dtype=torch.bool).tril(212 - new)
    wanted = torch.nn.functional.scaled_dot_product_attention(
        query, *whole, attn_mask=causal if mask is None else mask, scale=1.0
    )
    torch.testing.assert_close(got, wanted, atol=2e-5, rtol=1e-4)


def test_sinks_stay_exact_and_codes_come_back() -> None:
    torch.manual_seed(1)
    keys, values = torch.randn(2, 2, 128, 16), torch.randn(2, 2, 128, 16)
    view = view_of(keys, values, 4.0, [3, 10])
    rebuilt, _ = view.rebuild(torch.float32)
    assert torch.equal(rebuilt[0, :, 3:5], keys[0, :, 3:5])
    assert torch.equal(rebuilt[1, :, 10:12], keys[1, :, 10:12])
    plain = view.key_code.decode(view.keys.whole())
    again = view.key_code.encode(plain)
    for width, part in view.keys.whole().items():
        assert part.numel() == 0 or (again[width] == part).float().mean() > 0.999


@settings(deadline=None, max_examples=40)
@given(st.floats(0.1, 8.0), st.integers(1, 60), st.integers(0, 99))
def test_allocation_never_exceeds_and_fills(bits: float, count: int, seed: int) -> None:
    deviation = torch.rand(count, generator=torch.Generator().manual_seed(seed)) * 4 + 1e-3
    curve = Curve.measure(torch.randn(4000, generator=torch.Generator().manual_seed(0)))
    chosen = allocate(deviation, curve, bits)
    assert set(chosen.tolist()) <= set(ALLOWED)
    assert float(chosen.sum()) <= bits * count
    if count > 20:
        assert float(chosen.double().mean()) > bits - 0.15


def test_more_deviation_never_gets_fewer_bits() -> None:
    curve = Curve.measure(torch.randn(20_000, generator=torch.Generator().manual_seed(0)))
    chosen = allocate(torch.logspace(2, -2, 64), curve, 2.0)
    assert (chosen.diff() <= 0).float().mean() > 0.95


@pytest.mark.parametrize("name", FAMILIES)
def test_contracted_generation_equals_rebuilt(name: str, ids: Tensor) -> None:
    model, long = tiny(name), torch.cat([ids, ids], 1)
    mask = torch.ones_like(long)
    mask[0, :17] = 0
    options = {"bits": 4.0, "profile": tiny_profile(name)}
    rebuilt = generate(model, long, kv.CompressedCache(model, **options), attention_mask=mask)
    with contracting(model):
        contracted = generate(model, long, kv.CompressedCache(model, **options), attention_mask=mask)
    assert (rebuilt == contracted).float().mean() > 0.99


def test_context_leaves_everything_as_found(ids: Tensor) -> None:
    model = tiny("llama-gqa")
    before = model.config._attn_implementation
    registry, masks = dict(ALL_ATTENTION_FUNCTIONS), dict(ALL_MASK_ATTENTION_FUNCTIONS)
    with kv.compressed(model, bits=4.0) as caches:
        assert model.config._attn_implementation == NAME
        model.generate(torch.cat([ids, ids], 1), max_new_tokens=5, pad_token_id=0, do_sample=False)
    assert len(caches) == 1
    assert caches[0].report().sealed_tokens > 0
    assert model.config._attn_implementation == before
    assert dict(ALL_ATTENTION_FUNCTIONS) == registry
    assert dict(ALL_MASK_ATTENTION_FUNCTIONS) == masks
    assert "generate" not in model.__dict__
    with pytest.raises(RuntimeError, match="inside"), kv.compressed(model):
        raise RuntimeError("inside")
    assert model.config._attn_implementation == before


def test_cache_without_profile_counts_its_own_bases(ids: Tensor) -> None:
    model = tiny("llama-gqa")
    cache = kv.CompressedCache(model, bits=4.0)
    generate(model, torch.cat([ids, ids], 1), cache)
    report = cache.report()
    assert report.basis_nbytes > 0
    assert report.nbytes >= report.payload_nbytes + report.basis_nbytes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 9.0}, "9.0 bits"),
        ({"block": 100}, "multiple of 64"),
        ({"mode": "dead"}, "'dead'"),
        ({"window": -1}, "window must be at least 0"),
        ({"attention": "magic"}, "'magic'"),
    ],
)
def test_bad_options_are_named(options: dict, message: str) -> None:
    with pytest.raises(TensorNetError, match=message):
        kv.CompressedCache(tiny("llama-gqa"), **options)


def test_a_profile_of_another_model_is_refused() -> None:
    with pytest.raises(TensorNetError, match="profile was made for"):
        kv.CompressedCache(tiny("gemma3-hybrid"), profile=tiny_profile("llama-gqa"))
