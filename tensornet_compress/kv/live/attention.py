"""Attention that contracts queries with packed codes instead of rebuilding keys and values.

Scores: q . k = (q A_k') code_k, values: (w code_v') A_v, with A the decoder's rows scaled by step and place value. Working
memory is one chunk of unpacked codes and the scores.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tensornet_compress.errors import TensorNetError
from tensornet_compress.kernels.integer_products import codes_times, integer_products, times_codes
from tensornet_compress.kv.live.layer import LiveView, attached

NAME = "tensornet_compress_kv"
_UNSUPPORTED = ("softcap", "s_aux", "position_bias", "sinks")


def contracting_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The attention function registered as ``NAME``: (batch, heads, new, width) -> (batch, new, heads, width).

    Keys without sealed tokens attached take the stock SDPA path.
    """
    view = attached(key)
    if view is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)
    used = [name for name in _UNSUPPORTED if kwargs.get(name) is not None]
    if used:
        raise TensorNetError(f"contracting attention does not know {used}; use the cache with attention='rebuild'")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out = attend(query.float() * scale, key.float(), value.float(), view, attention_mask)
    return out.to(query.dtype).transpose(1, 2).contiguous(), None


def attend(query: Tensor, tail_keys: Tensor, tail_values: Tensor, view: LiveView, mask: Tensor | None) -> Tensor:
    """Attention over sealed tokens, then the exact tail; all fp32.

    Args:
        query: scaled, (batch, query heads, new, width). tail_keys, tail_values: (batch, KV heads, tail, width).
        mask: ``None`` (causal), boolean (True: visible) or additive, broadcastable to (batch, heads, new, sealed + tail).
    """
    batch, query_heads, new, width = query.shape
    heads, tail = tail_keys.shape[1], tail_keys.shape[2]
    grouped = query.reshape(batch, heads, -1, width)
    scores = torch.cat([_sealed_scores(grouped, view), grouped @ tail_keys.mT], -1)
    scores = scores.view(batch, query_heads, new, view.tokens + tail)
    if mask is None and new > 1:
        mask = torch.ones(new, view.tokens + tail, dtype=torch.bool, device=query.device).tril(view.tokens + tail - new)
    if mask is not None:
        mask = mask[..., : scores.shape[-1]]
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min) if mask.dtype == torch.bool else scores + mask
    weights = scores.softmax(-1).view(batch, heads, -1, scores.shape[-1])
    sealed, recent = weights.split([view.tokens, tail], -1)
    out = _sealed_values(sealed, view) + recent @ tail_values
    return out.view(batch, query_heads, new, -1)


def _sealed_scores(grouped: Tensor, view: LiveView) -> Tensor:
    """(batch, KV heads, queries, width) -> scores (batch, KV heads, queries, sealed tokens)."""
    code = view.key_code
    code.to(grouped.device)
    factors = grouped @ code.head_operand.mT
    batch, heads, queries, rows = factors.shape
    flat = factors.view(batch, heads * queries, rows)
    scores = torch.empty(batch, heads * queries, view.tokens, device=grouped.device)
    integers, done = integer_products(flat.device), 0
    for chunk in view.keys.chunks:
        fields = code.layout.unpack(chunk)
        tokens = fields.shape[2]
        scores[:, :, done : done + tokens] = times_codes(flat, fields, integers)
        done += tokens
    scores = scores.view(batch, heads, queries, view.tokens)
    scores += (grouped * code.head_constant[:, None]).sum(-1, keepdim=True)
    index = view.sink_index[:, None, None, :].expand(-1, heads, queries, -1)
    return scores.scatter_(3, index, grouped @ view.sink_keys.float().mT)


def _sealed_values(weights: Tensor, view: LiveView) -> Tensor:
    """Weights (batch, KV heads, queries, sealed tokens) -> weighted values (batch, KV heads, queries, width)."""
    code = view.value_code
    code.to(weights.device)
    batch, heads, queries, _ = weights.shape
    index = view.sink_index[:, None, None, :].expand(-1, heads, queries, -1)
    sink_weights = weights.gather(3, index)
    coded = weights.scatter(3, index, 0.0)
    flat = coded.view(batch, heads * queries, -1)
    total: Tensor | float = 0.0
    integers, done = integer_products(flat.device), 0
    for chunk in view.values.chunks:
        fields = code.layout.unpack(chunk)
        tokens = fields.shape[2]
        total = total + codes_times(fields, flat[:, :, done : done + tokens], integers)
        done += tokens
    factors = torch.as_tensor(total).view(batch, heads, queries, -1)
    constant = coded.sum(-1, keepdim=True) * code.head_constant[:, None]
    return factors @ code.head_operand + constant + sink_weights @ view.sink_values.float()


@contextmanager
def contracting(model: nn.Module) -> Iterator[None]:
    """Inside, the model's attention contracts against live caches; afterwards everything is as it was.

    Raises:
        TensorNetError: the model does not take registered attention functions.
    """
    with attending_with(model, NAME, contracting_attention):
        yield


@contextmanager
def attending_with(model: nn.Module, name: str, function: Callable[..., Any]) -> Iterator[None]:
    """Inside, ``function`` is registered as ``name`` and is the model's attention; afterwards everything is as it was.

    Raises:
        TensorNetError: the model does not take registered attention functions.
    """
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    chosen: Any = model
    before = chosen.config._attn_implementation
    nested = name in ALL_ATTENTION_FUNCTIONS
    if not nested:
        ALL_ATTENTION_FUNCTIONS[name] = function
        # Masks are only made for names in the class-wide mapping; without one, padding would go unmasked.
        ALL_MASK_ATTENTION_FUNCTIONS.register(name, sdpa_mask)
    try:
        try:
            chosen.set_attn_implementation(name)
        except (ValueError, ImportError) as error:
            raise TensorNetError(f"{type(model).__name__} takes no registered attention function: {error}") from error
        yield
    finally:
        chosen.set_attn_implementation(before)
        if not nested:
            del ALL_ATTENTION_FUNCTIONS[name]
            del type(ALL_MASK_ATTENTION_FUNCTIONS)._global_mapping[name]
