"""Live codes: contraction equals rebuilding, allocation meets its budget, no global state is left behind."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import tensornet_compress.kv as kv
from tensornet_compress.coding.fixed_rate import allocate
from tensornet_compress.coding.planes import Planes
from tensornet_compress.errors import TensorNetError
from tensornet_compress.kv.live import attention
from tensornet_compress.kv.live.attention import CodedSide, CodedStates
from tensornet_compress.kv.live.codec import SideCode, own_basis
from tests.kv.tiny_models import FAMILIES, generate, tiny, tiny_profile


def coded(states: Tensor, bits: float, first: list[int]) -> CodedSide:
    """Codes of states (batch, heads, tokens, width), with two exact sinks a row; of no bits, each token is the mean."""
    basis, curve = own_basis(states)
    given = allocate(basis.deviation, curve, bits) if bits else torch.zeros(len(basis.deviation), dtype=torch.int64)
    code = SideCode(basis, given, curve, states.shape[1])
    index = torch.tensor(first)[:, None] + torch.arange(2)
    wide = index[:, None, :, None].expand(-1, states.shape[1], -1, states.shape[3])
    side = CodedSide(code, Planes(()), 0, states.gather(2, wide), index)
    return side.append(states[:, :, :64]).append(states[:, :, 64:])


@pytest.mark.parametrize(
    ("masked", "new", "rates"),
    [*itertools.product(["none", "boolean", "additive"], [1, 5], [(3.0, 3.0)]), ("none", 1, (0, 3.0)), ("none", 5, (3.0, 0))],
)
def test_contraction_equals_attention_over_rebuilt_states(masked: str, new: int, rates: tuple[float, float]) -> None:
    torch.manual_seed(0)
    sides = [coded(torch.randn(2, 2, 192, 16) * torch.linspace(0.1, 2, 16), rate, [7, 0]) for rate in rates]
    keys, values = (CodedStates(side, torch.randn(2, 2, 20, 16), new) for side in sides)
    query = torch.randn(2, 6, new, 16)
    visible = torch.ones(2, 1, new, 212, dtype=torch.bool).tril(212 - new)
    visible[0, ..., :7] = False
    additive = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)
    mask = {"none": None, "boolean": visible, "additive": additive}[masked]
    got = scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=0.7, enable_gqa=True)
    assert keys._whole is None, "nothing was rebuilt"
    whole = [part.whole().repeat_interleave(3, 1) for part in (keys, values)]
    wanted = scaled_dot_product_attention(query, *whole, attn_mask=mask, scale=0.7)
    torch.testing.assert_close(got, wanted, atol=2e-5, rtol=1e-4)
    # Now that they were rebuilt, that is what counts.
    assert torch.equal(scaled_dot_product_attention(query, keys, values, mask, scale=0.7, enable_gqa=True), wanted)


def test_other_operations_see_the_rebuilt_states() -> None:
    torch.manual_seed(1)
    side, tail = coded(torch.randn(2, 2, 128, 16), 4.0, [3, 10]), torch.randn(2, 2, 5, 16)
    whole = torch.cat([side.rebuild(torch.float32), tail], 2)
    states = CodedStates(side, tail, 2)
    assert (states.shape, states.dtype, states.dim(), states.size(2)) == (whole.shape, whole.dtype, 4, 133)
    assert states._whole is None, "asking for a shape rebuilds nothing"
    other = torch.randn(2, 2, 133, 16)
    for operation in (
        lambda part: part.transpose(1, 2),
        lambda part: part[:, :, None].expand(-1, -1, 3, -1, -1).reshape(2, 6, 133, 16),
        lambda part: torch.cat([other, part], -1),
        lambda part: torch.nn.functional.linear(part, other[0, 0]),
        lambda part: part @ other.mT,
        lambda part: torch.einsum("bhtw,bhsw->bhts", other, part),
        lambda part: scaled_dot_product_attention(other, part, other),
        lambda part: scaled_dot_product_attention(other, part, part, is_causal=True),
    ):
        found = operation(CodedStates(side, tail, 2))
        assert type(found) is Tensor
        assert torch.equal(found, operation(whole))


def test_gradients_of_queries_and_masks_are_those_of_rebuilt_states() -> None:
    torch.manual_seed(2)
    sides, tails = [coded(torch.randn(1, 2, 2112, 16), 4.0, [0]) for _ in range(2)], torch.randn(2, 1, 2, 5, 16)
    found = []
    for rebuild in (True, False):
        query = torch.ones(1, 2, 1, 16, requires_grad=True)
        bias = torch.zeros(1, 2, 1, 2117, requires_grad=True)
        pair = [CodedStates(side, tail, 2) for side, tail in zip(sides, tails)]
        scaled_dot_product_attention(query, *(part.whole() if rebuild else part for part in pair), bias).sum().backward()
        found.append((query.grad, bias.grad))
    for one, other in zip(*found):
        assert one.abs().max() > 0
        torch.testing.assert_close(one, other)


def test_what_attention_refuses_stays_refused() -> None:
    part = CodedStates(coded(torch.randn(1, 2, 128, 16), 4.0, [0]), torch.randn(1, 2, 5, 16), 1)
    with pytest.raises(RuntimeError, match="must match"), pytest.warns(UserWarning, match="rebuilt"):
        scaled_dot_product_attention(torch.randn(1, 6, 1, 16), part, part)


def test_sinks_stay_exact_and_codes_come_back() -> None:
    torch.manual_seed(1)
    keys = torch.randn(2, 2, 128, 16)
    side = coded(keys, 4.0, [3, 10])
    rebuilt = side.rebuild(torch.float32)
    assert torch.equal(rebuilt[0, :, 3:5], keys[0, :, 3:5])
    assert torch.equal(rebuilt[1, :, 10:12], keys[1, :, 10:12])
    again = side.code.encode(side.code.decode(side.planes.whole()))
    for width, part in side.planes.whole().items():
        assert part.numel() == 0 or (again[width] == part).float().mean() > 0.999


@pytest.mark.parametrize("name", FAMILIES)
def test_contracted_generation_equals_rebuilt(name: str, ids: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    model, long = tiny(name), torch.cat([ids, ids], 1)
    mask = torch.ones_like(long)
    mask[0, :17] = 0
    options = {"bits": 4.0, "profile": tiny_profile(name)}
    rebuilt = generate(model, long, kv.CompressedCache(model, **options, attention="rebuild"), attention_mask=mask)
    contract, calls = attention._contracted, []
    monkeypatch.setattr(attention, "_contracted", lambda *args, **more: calls.append(contract(*args, **more)) or calls[-1])
    contracted = generate(model, long, kv.CompressedCache(model, **options), attention_mask=mask)
    assert sum(call is not None for call in calls) >= 59
    assert (rebuilt == contracted).float().mean() > 0.99


def test_context_leaves_everything_as_found(ids: Tensor) -> None:
    model = tiny("llama-gqa")
    before = model.config._attn_implementation
    registry, masks = dict(ALL_ATTENTION_FUNCTIONS), dict(ALL_MASK_ATTENTION_FUNCTIONS)
    with kv.compressed(model, bits=4.0) as caches:
        assert model.config._attn_implementation == before
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
    with pytest.raises(TensorNetError, match=r"load a folder by kv\.Profile\.load"):
        kv.CompressedCache(tiny("llama-gqa"), profile="out/profile")


@pytest.mark.parametrize("mode", ["live", "storage"])
@pytest.mark.parametrize("change", [{"num_key_value_heads": 4}, {"head_dim": 4}])
def test_states_of_other_heads_than_those_of_the_profile_are_refused_at_once(mode: str, change: dict) -> None:
    config = copy.deepcopy(tiny("llama-gqa").config)
    config.update(change)
    model = type(tiny("llama-gqa"))(config)
    cache = kv.CompressedCache(model, profile=tiny_profile("llama-gqa"), mode=mode)
    with pytest.raises(TensorNetError, match=r"layer 0 caches keys of .*, the profile was made for 2 of width 16"):
        model(torch.ones(1, 3, dtype=torch.int64), past_key_values=cache)


@torch.no_grad()
def test_a_crop_to_before_the_first_codes_keeps_the_sinks_of_padded_rows(ids: Tensor, tmp_path: Path) -> None:
    model = tiny("llama-gqa")
    long, mask = torch.cat([ids, ids], 1), torch.ones(2, 180, dtype=torch.int64)
    mask[0, :17] = 0
    cache = kv.CompressedCache(model, 4.0, tiny_profile("llama-gqa"))
    model(long, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp_min(0), past_key_values=cache)
    cache.crop(-120)
    cache.save(tmp_path / "cache")
    for cropped in (cache, kv.CompressedCache.load(tmp_path / "cache", model, tiny_profile("llama-gqa"))):
        assert cropped.report().sealed_tokens == 0
        places = torch.arange(60, 180).expand(2, -1) - torch.tensor([[17], [0]])
        model(long[:, 60:], attention_mask=mask, position_ids=places, past_key_values=cropped)
        assert cropped.layers[0].sides[0].index[:, 0].tolist() == [17, 0]
