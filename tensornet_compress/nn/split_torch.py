"""Attention, recurrent, bilinear and bag modules of torch, with layers in the place of bare parameters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from tensornet_compress.nn.split import SplitModule, linear, noise


class SplitAttention(SplitModule):
    """``nn.MultiheadAttention`` made of ``q_proj``, ``k_proj``, ``v_proj`` and ``out_proj``."""

    def __init__(self, original: Any):
        super().__init__(original)
        weights = (original.q_proj_weight, original.k_proj_weight, original.v_proj_weight)
        if original._qkv_same_embed_dim:
            weights = original.in_proj_weight.chunk(3)
        biases = (None,) * 3 if original.in_proj_bias is None else original.in_proj_bias.chunk(3)
        for name, weight, bias in zip(("q_proj", "k_proj", "v_proj"), weights, biases):
            self.add_module(name, linear(weight, bias))
        self.out_proj = linear(original.out_proj.weight, original.out_proj.bias)
        # The encoder layers of torch take a short cut through the weights of an attention of which this is true.
        self._original._qkv_same_embed_dim = False
        self.__dict__["_same"] = original._qkv_same_embed_dim

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As ``nn.MultiheadAttention``."""
        if query.is_nested:  # what encoders of torch make of a padded batch
            rows = zip(query.unbind(), key.unbind(), value.unbind())
            return torch.nested.as_nested_tensor([self(*row, need_weights=False)[0] for row in rows]), None
        original, single = self._original, query.ndim == 2
        states = [part[None] if single else part for part in (query, key, value)]
        if not original.batch_first and not single:
            states = [part.transpose(0, 1) for part in states]
        heads: list[Tensor] = [
            getattr(self, name)(part).unflatten(-1, (original.num_heads, -1)).transpose(1, 2)
            for name, part in zip(("q_proj", "k_proj", "v_proj"), states)
        ]
        mask = self._mask(attn_mask, key_padding_mask, heads)
        scores = heads[0] @ heads[1].transpose(-1, -2) * heads[0].shape[-1] ** -0.5
        paid = (scores if mask is None else scores + mask).softmax(-1)
        out = self.out_proj((F.dropout(paid, original.dropout, self.training) @ heads[2]).transpose(1, 2).flatten(2))
        if not original.batch_first and not single:
            out = out.transpose(0, 1)
        told = (paid.mean(1) if average_attn_weights else paid) if need_weights else None
        return (out[0], None if told is None else told[0]) if single else (out, told)

    def joined(self) -> nn.Module:
        """As in the base class."""
        made: Any = super().joined()
        made._qkv_same_embed_dim = self._same
        made.out_proj = NonDynamicallyQuantizableLinear(made.embed_dim, made.embed_dim, device="meta")
        made.out_proj.weight, made.out_proj.bias = self.out_proj.weight, self.out_proj.bias
        return made.train(self.training)

    def whole(self) -> dict[str, Tensor]:
        """As in the base class."""
        weights = {f"{name}_weight": getattr(self, name).weight.detach() for name in ("q_proj", "k_proj", "v_proj")}
        found = {"in_proj_weight": torch.cat(list(weights.values()))} if self._same else weights
        bias = self.in_proj_bias
        return found if bias is None else found | {"in_proj_bias": bias.detach()}

    @property
    def in_proj_weight(self) -> Tensor | None:
        """As the original had it, for readers; put together at each access."""
        original = self._original
        if not original.kdim == original.vdim == original.embed_dim:
            return None
        return torch.cat([part.weight for part in (self.q_proj, self.k_proj, self.v_proj)])

    @property
    def in_proj_bias(self) -> Tensor | None:
        """As the original had it, for readers; put together at each access."""
        biases = [part.bias for part in (self.q_proj, self.k_proj, self.v_proj)]
        return None if biases[0] is None else torch.cat(biases)

    def _mask(self, attention: Tensor | None, padding: Tensor | None, heads: Sequence[Tensor]) -> Tensor | None:
        """Both masks as one that is added to scores (batch, heads, queries, keys)."""
        total: Tensor | None = None
        if attention is not None and attention.ndim == 3:
            attention = attention.unflatten(0, (-1, self._original.num_heads))
        for mask in (attention, None if padding is None else padding.reshape(len(heads[0]), 1, 1, -1)):
            if mask is not None:
                if mask.dtype == torch.bool:
                    mask = torch.zeros_like(mask, dtype=heads[0].dtype).masked_fill(mask, -torch.inf)
                total = mask if total is None else total + mask
        return total

    @staticmethod
    def probe(original: Any) -> list[tuple[Any, ...]]:
        """Inputs to compare with the original on."""
        like = original.out_proj.weight
        widths = (original.embed_dim, original.kdim, original.vdim)
        return [tuple(noise((3, 3, width), like) for width in widths)]

    @staticmethod
    def fits(module: Any) -> bool:
        """Whether a module is one of these."""
        plain = type(module) is nn.MultiheadAttention
        return plain and module.bias_k is None and module.bias_v is None and not module.add_zero_attn


class SplitRecurrent(SplitModule):
    """``nn.LSTM``, ``nn.GRU`` or ``nn.RNN`` made of layers ``ih_l0``, ``hh_l0`` and so on; torch's own kernel runs with their
    weights, or, while somebody looks at their calls, one step after the other."""

    def __init__(self, original: Any):
        super().__init__(original)
        held = dict(original.named_parameters(recurse=False))
        for name in original._flat_weights_names:
            if name.startswith("weight_"):
                layer = linear(held[name], held.get(name.replace("weight_", "bias_")))
                self.add_module(name.removeprefix("weight_"), layer)
        self._names = tuple(original._flat_weights_names)
        # Torch compares these lists before each call.
        self._original.__dict__.update(_flat_weights=[], _flat_weight_refs=[], _flat_weights_names=[])

    def forward(self, given: Any, hx: Any = None) -> Any:
        """As the module that was replaced."""
        original = self._original
        if self.watched and isinstance(given, Tensor):
            return self._steps(given, hx)
        flat = []
        for name in self._names:
            part = getattr(self, name.partition("_")[2])
            flat.append(part.weight if name.startswith("weight_") else part.bias)
        original.__dict__["_flat_weights"] = flat
        try:
            return original.forward(given, hx)
        finally:
            original.__dict__["_flat_weights"] = []

    def joined(self) -> nn.Module:
        """As in the base class."""
        made: Any = super().joined()
        made.__dict__["_flat_weights_names"] = list(self._names)
        made._init_flat_weights()
        return made

    def whole(self) -> dict[str, Tensor]:
        """As in the base class."""
        found = {}
        for name in self._names:
            layer = getattr(self, name.partition("_")[2])
            found[name] = (layer.weight if name.startswith("weight_") else layer.bias).detach()
        return found

    def _steps(self, given: Tensor, hx: Any) -> Any:
        original, single = self._original, given.ndim == 2
        lstm, ways = original.mode == "LSTM", 2 if original.bidirectional else 1
        x = given[:, None] if single else given.transpose(0, 1) if original.batch_first else given
        states = () if hx is None else hx if isinstance(hx, tuple) else (hx,)
        states = tuple(state[:, None] if single else state for state in states)
        ends: list[tuple[Tensor, ...]] = []
        for number in range(original.num_layers):
            outputs = []
            for way in range(ways):
                suffix = f"l{number}" + ("_reverse" if way else "")
                width = getattr(self, f"hh_{suffix}").in_features
                start = tuple(state[number * ways + way] for state in states)
                if not start:
                    start = (x.new_zeros(x.shape[1], width), *([x.new_zeros(x.shape[1], original.hidden_size)] if lstm else []))
                told, end = self._direction(x.flip(0) if way else x, start, suffix)
                outputs.append(told.flip(0) if way else told)
                ends.append(end)
            x = torch.cat(outputs, -1)
            if number + 1 < original.num_layers:
                x = F.dropout(x, original.dropout, self.training)
        last = tuple(torch.stack(parts) for parts in zip(*ends))
        if single:
            x, last = x[:, 0], tuple(part[:, 0] for part in last)
        elif original.batch_first:
            x = x.transpose(0, 1)
        return x, last if lstm else last[0]

    def _direction(self, x: Tensor, state: tuple[Tensor, ...], suffix: str) -> tuple[Tensor, tuple[Tensor, ...]]:
        """One layer in one direction: x (length, batch, width) -> outputs and the last state."""
        mode, told = self._original.mode, []
        fed, again = getattr(self, f"ih_{suffix}")(x), getattr(self, f"hh_{suffix}")
        shrink = self._modules.get(f"hr_{suffix}")
        for step in fed:
            back = again(state[0])
            if mode == "LSTM":
                take, forget, new, give = (step + back).chunk(4, -1)
                cell = forget.sigmoid() * state[1] + take.sigmoid() * new.tanh()
                out = give.sigmoid() * cell.tanh()
                state = (out if shrink is None else shrink(out), cell)
            elif mode == "GRU":
                (reset, keep, new), (reset_h, keep_h, new_h) = step.chunk(3, -1), back.chunk(3, -1)
                kept = (keep + keep_h).sigmoid()
                state = ((1 - kept) * (new + (reset + reset_h).sigmoid() * new_h).tanh() + kept * state[0],)
            else:
                total = step + back
                state = (total.relu() if mode == "RNN_RELU" else total.tanh(),)
            told.append(state[0])
        return torch.stack(told), state

    @staticmethod
    def probe(original: Any) -> list[tuple[Any, ...]]:
        """Inputs to compare with the original on."""
        return [(noise((3, 2, original.input_size), original._flat_weights[0]),)]

    @staticmethod
    def fits(module: Any) -> bool:
        """Whether a module is one of these."""
        known = type(module) in (nn.LSTM, nn.GRU, nn.RNN)
        return known and set(module._flat_weights_names) <= set(module._parameters)


class SplitBilinear(SplitModule):
    """``nn.Bilinear`` with ``product``, a layer on outer products of both inputs."""

    def __init__(self, original: Any):
        super().__init__(original)
        self.product = linear(original.weight.flatten(1), original.bias)

    def forward(self, one: Tensor, other: Tensor) -> Tensor:
        """As ``nn.Bilinear``."""
        if self.watched:
            return self.product((one[..., :, None] * other[..., None, :]).flatten(-2))
        weight = self.product.weight.unflatten(1, (self._original.in1_features, -1))
        return F.bilinear(one, other, weight, self.product.bias)

    def whole(self) -> dict[str, Tensor]:
        """As in the base class."""
        held = {"weight": self.product.weight.detach().unflatten(1, (self._original.in1_features, -1)).contiguous()}
        return held if self.product.bias is None else held | {"bias": self.product.bias.detach()}

    @staticmethod
    def probe(original: Any) -> list[tuple[Any, ...]]:
        """Inputs to compare with the original on."""
        return [(noise((3, original.in1_features), original.weight), noise((3, original.in2_features), original.weight))]

    @staticmethod
    def fits(module: Any) -> bool:
        """Whether a module is one of these."""
        return type(module) is nn.Bilinear


class SplitBag(SplitModule):
    """``nn.EmbeddingBag`` of sums or means, with ``table``, an embedding."""

    def __init__(self, original: Any):
        super().__init__(original)
        table = nn.Embedding(original.num_embeddings, original.embedding_dim, device="meta")
        table.weight = nn.Parameter(original.weight.detach(), original.weight.requires_grad)
        self.table = table

    def forward(self, given: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None) -> Tensor:
        """As ``nn.EmbeddingBag``."""
        original = self._original
        if given.ndim == 2:
            bags = torch.arange(len(given), device=given.device).repeat_interleave(given.shape[1])
            count = len(given)
        else:
            assert offsets is not None
            starts = offsets[:-1] if original.include_last_offset else offsets
            bags = torch.bucketize(torch.arange(len(given), device=given.device), starts.contiguous(), right=True) - 1
            count = len(starts)
        rows = self.table(given.reshape(-1))
        share = torch.ones(len(rows), device=rows.device, dtype=rows.dtype)
        if original.padding_idx is not None:
            share = share * (given.reshape(-1) != original.padding_idx)
        held = rows.new_zeros(count).index_add(0, bags, share).clamp_min(1)
        if per_sample_weights is not None:
            share = share * per_sample_weights.reshape(-1)
        total = rows.new_zeros(count, rows.shape[1]).index_add(0, bags, rows * share[:, None])
        return total / held[:, None] if original.mode == "mean" else total

    def whole(self) -> dict[str, Tensor]:
        """As in the base class."""
        return {"weight": self.table.weight.detach()}

    @staticmethod
    def probe(original: Any) -> list[tuple[Any, ...]]:
        """Inputs to compare with the original on."""
        ids = torch.arange(6, device=original.weight.device) % len(original.weight)
        offsets = torch.tensor([0, 0, 4, 6] if original.include_last_offset else [0, 0, 4], device=ids.device)
        return [(ids.view(2, 3),), (ids, offsets)]

    @staticmethod
    def fits(module: Any) -> bool:
        """Whether a module is one of these."""
        return type(module) is nn.EmbeddingBag and module.mode in ("sum", "mean") and module.max_norm is None
