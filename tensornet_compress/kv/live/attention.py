"""Coded tokens of a layer, and attention that contracts queries with them instead of rebuilding keys and values.

Scores: q . k = (q A_k') code_k, values: (w code_v') A_v, with A the decoder's rows scaled by step and place value. Working
memory is one chunk of unpacked codes and the scores.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._pytree import tree_map_only

from tensornet_compress.coding.planes import UNIT, Planes
from tensornet_compress.kernels.plane_attention import CodedTokens, attended, attends
from tensornet_compress.kernels.plane_products import planes_times, times_planes
from tensornet_compress.kv.live.codec import SideCode

_NOTE = (
    "the attention of this model does not contract with coded keys and values: they are rebuilt at every step, layer by layer, "
    "which gives the same scores in more time and memory; attention='rebuild' does that without this note"
)


@dataclass(frozen=True)
class CodedSide:
    """The sealed tokens of keys or values of one layer; never changed in place.

    ``sinks``: (batch, heads, sinks, width), exact; they stand in place of the tokens ``index`` (batch, sinks).
    """

    code: SideCode
    planes: Planes
    tokens: int
    sinks: Tensor
    index: Tensor

    def rebuild(self, dtype: torch.dtype) -> Tensor:
        """States (batch, heads, tokens, width)."""
        with torch.autocast(self.sinks.device.type, enabled=False):
            whole = torch.cat([self.code.decode(chunk).to(dtype) for chunk in self.planes.chunks], 2)
        index = self.index[:, None, :, None].expand(-1, whole.shape[1], -1, whole.shape[3])
        return whole.scatter_(2, index, self.sinks.to(dtype))

    def append(self, states: Tensor) -> CodedSide:
        """With more states (batch, heads, new, width) behind those held."""
        return replace(self, planes=self.planes.append(self.code.encode(states)), tokens=self.tokens + states.shape[2])

    def first(self, units: int) -> CodedSide:
        """Only the first ``units`` of ``UNIT`` tokens."""
        return replace(self, planes=self.planes.first(units), tokens=units * UNIT)

    def select(self, rows: Tensor) -> CodedSide:
        """Rows of the batch."""
        rows = rows.to(self.sinks.device)
        sinks, index = self.sinks.index_select(0, rows), self.index.index_select(0, rows)
        return replace(self, planes=self.planes.select(rows), sinks=sinks, index=index)

    def to(self, device: torch.device) -> CodedSide:
        """On another device."""
        sinks, index = (part.to(device, non_blocking=True) for part in (self.sinks, self.index))
        return replace(self, planes=self.planes.to(device), sinks=sinks, index=index)


class CodedStates(Tensor):
    """Keys or values of a layer, coded tokens and then an exact tail, that look like one tensor (batch, heads, tokens, width).

    ``scaled_dot_product_attention`` contracts with them. Any other operation gets them rebuilt, so that a model which repeats,
    projects or rotates what its cache gave it, or attends in its own way, computes what it would with a plain tensor.
    """

    side: CodedSide
    tail: Tensor
    queries: int
    _whole: Tensor | None

    @staticmethod
    def __new__(cls, side: CodedSide, tail: Tensor, queries: int) -> CodedStates:
        """``queries``: how many tokens at the end attend now."""
        batch, heads, recent, width = tail.shape
        shape = (batch, heads, side.tokens + recent, width)
        made: CodedStates = Tensor._make_wrapper_subclass(cls, shape, dtype=tail.dtype, device=tail.device)
        made.side, made.tail, made.queries, made._whole = side, tail, queries, None
        return made

    def tokens(self) -> CodedTokens:
        """What loops take."""
        code = self.side.code
        code.to(self.tail.device)
        return CodedTokens(code.layout, self.side.planes, code.rows, self.side.sinks.float(), self.tail.float())

    @torch.compiler.disable
    def whole(self) -> Tensor:
        """The plain tensor; rebuilt once."""
        if self._whole is None:
            self._whole = torch.cat([self.side.rebuild(self.tail.dtype), self.tail], 2)
        return self._whole

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is scaled_dot_product_attention:
            contracted = _contracted(*args, **(kwargs or {}))
            if contracted is not None:
                return contracted
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        args, kwargs = tree_map_only(CodedStates, CodedStates._rebuilt, (args, kwargs or {}))
        return func(*args, **kwargs)

    def _rebuilt(self) -> Tensor:
        if self.queries == 1:
            warnings.warn(_NOTE, stacklevel=2)
        return self.whole()


@torch.compiler.disable
def _contracted(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, dropout_p: float = 0, is_causal: bool = False, **more: Any
) -> Tensor | None:
    """``scaled_dot_product_attention`` with codes; ``None`` where only rebuilt keys and values give it."""
    if not (isinstance(key, CodedStates) and isinstance(value, CodedStates)) or not key._whole is value._whole is None:
        return None
    if dropout_p or is_causal or query.dim() != 4 or query.shape[0] != key.shape[0]:
        return None
    if query.shape[1] != key.shape[1] != 1 and not more.get("enable_gqa"):
        return None
    if torch.is_grad_enabled() and (query.requires_grad or (attn_mask is not None and attn_mask.requires_grad)):
        return None
    scale = query.shape[-1] ** -0.5 if more.get("scale") is None else more["scale"]
    with torch.autocast(query.device.type, enabled=False):
        scaled = query.float() * scale
        out = _attend_at_once(scaled, key, value) if attn_mask is None else None
        if out is None:
            out = attend(scaled, key, value, attn_mask)
    return out.to(query.dtype)


def _attend_at_once(query: Tensor, keys: CodedStates, values: CodedStates) -> Tensor | None:
    """``attend`` without a mask, by one loop over the codes; ``None`` where there is none for such codes."""
    grouped = query.reshape(len(query), keys.tail.shape[1], -1, query.shape[-1])
    if not attends(grouped, keys.side.planes, values.side.planes) or not torch.equal(keys.side.index, values.side.index):
        return None
    return attended(grouped, keys.side.index, keys.tokens(), values.tokens()).view(query.shape)


def attend(query: Tensor, keys: CodedStates, values: CodedStates, mask: Tensor | None) -> Tensor:
    """Attention over coded tokens, then the exact tail; fp32.

    Args:
        query: scaled, (batch, query heads, new, width); consecutive query heads share a KV head.
        mask: ``None`` (everything is visible), boolean (True: visible) or additive, broadcastable to (batch, query heads, new,
            tokens).
    """
    batch, query_heads, new, width = query.shape
    heads, tokens = keys.tail.shape[1], keys.side.tokens
    grouped = query.reshape(batch, heads, -1, width)
    scores = torch.cat([_sealed_scores(grouped, keys.side), grouped @ keys.tail.float().mT], -1)
    if mask is not None:
        scores = scores.view(batch, query_heads, new, -1)
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min) if mask.dtype == torch.bool else scores + mask
        scores = scores.view(batch, heads, -1, scores.shape[-1])
    sealed, recent = scores.softmax(-1).split([tokens, scores.shape[-1] - tokens], -1)
    out = _sealed_values(sealed, values.side) + recent @ values.tail.float()
    return out.view(batch, query_heads, new, -1)


def _sealed_scores(grouped: Tensor, side: CodedSide) -> Tensor:
    """(batch, KV heads, queries, width) -> scores (batch, KV heads, queries, sealed tokens)."""
    code = side.code
    code.to(grouped.device)
    factors = grouped @ code.head_operand.mT
    scores = times_planes(factors.flatten(1, 2), code.layout, side.planes).view(*grouped.shape[:3], side.tokens)
    scores += (grouped * code.head_constant[:, None]).sum(-1, keepdim=True)
    index = side.index[:, None, None, :].expand(*scores.shape[:3], -1)
    return scores.scatter_(3, index, grouped @ side.sinks.float().mT)


def _sealed_values(weights: Tensor, side: CodedSide) -> Tensor:
    """Weights (batch, KV heads, queries, sealed tokens) -> weighted values (batch, KV heads, queries, width)."""
    code = side.code
    code.to(weights.device)
    index = side.index[:, None, None, :].expand(*weights.shape[:3], -1)
    coded = weights.scatter(3, index, 0.0)
    factors = planes_times(code.layout, side.planes, coded.flatten(1, 2)).view(*weights.shape[:3], -1)
    constant = coded.sum(-1, keepdim=True) * code.head_constant[:, None]
    return factors @ code.head_operand + constant + weights.gather(3, index) @ side.sinks.float()
