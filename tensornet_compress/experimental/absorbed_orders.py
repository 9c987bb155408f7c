"""Orders that cost nothing: permutations of a transformer's inner axes that neighbouring weights absorb.

Four axes of a Llama-like decoder may be reordered without changing what it computes: the neurons of each MLP, the channels of
each value head, the query heads inside a group that shares keys and values, and the residual stream (one order for the whole
model). The weights on both sides carry the order, so nothing is stored for it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tensornet_compress.errors import TensorNetError

_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_MLP = ("gate_proj", "up_proj", "down_proj")
_NORMS = ("input_layernorm", "post_attention_layernorm")
_KNOWN_LAYER = {"self_attn", "mlp", *_NORMS}


@dataclass(frozen=True)
class FreeOrders:
    """Permutations, int64: position ``i`` of the new axis shows entry ``order[i]`` of the old one. What is missing stays.

    ``residual``: (hidden,). By layer number: ``neurons`` (intermediate,), ``values`` (KV heads, head width), ``heads``
    (KV heads, query heads per KV head).
    """

    residual: Tensor | None = None
    neurons: Mapping[int, Tensor] = field(default_factory=dict)
    values: Mapping[int, Tensor] = field(default_factory=dict)
    heads: Mapping[int, Tensor] = field(default_factory=dict)

    def cpu(self) -> FreeOrders:
        """The same on the processor."""
        neurons, values, heads = (
            {number: order.cpu() for number, order in orders.items()} for orders in (self.neurons, self.values, self.heads)
        )
        return FreeOrders(None if self.residual is None else self.residual.cpu(), neurons, values, heads)


def free_orders(model: nn.Module) -> FreeOrders:
    """Orders that bring channels of like magnitude together, so that the groups of integer formats waste less of their range:
    residual channels by the size of the weights that read them, neurons and value channels by that of ``down_proj`` and
    ``o_proj``.

    Raises:
        TensorNetError: the model is not built like a Llama decoder.
    """
    decoder = _Decoder(model)
    readers = [getattr(layer.self_attn, name) for layer in decoder.layers for name in _ATTENTION[:3]]
    readers += [getattr(layer.mlp, name) for layer in decoder.layers for name in _MLP[:2]]
    energy = sum(reader.weight.detach().float().square().sum(0) for reader in readers)
    neurons, values = {}, {}
    for number, layer in enumerate(decoder.layers):
        neurons[number] = layer.mlp.down_proj.weight.detach().float().square().sum(0).argsort(stable=True)
        read = layer.self_attn.o_proj.weight.detach().float().square().sum(0)
        per_channel = read.view(decoder.kv_heads, decoder.group, decoder.width).sum(1)
        values[number] = per_channel.argsort(dim=1, stable=True)
    return FreeOrders(residual=torch.as_tensor(energy).argsort(stable=True), neurons=neurons, values=values)


@torch.no_grad()
def absorb_orders(model: nn.Module, orders: FreeOrders) -> None:
    """Rewrite the weights of ``model`` in place so that it has these orders and computes what it did.

    Raises:
        TensorNetError: the model is not built like a Llama decoder, or an order is not a permutation of its axis. The model is
            left as it was then.
    """
    decoder, orders = _Decoder(model), orders.cpu()
    decoder.check(orders)
    for number, layer in enumerate(decoder.layers):
        attention, mlp = layer.self_attn, layer.mlp
        if number in orders.neurons:
            order = orders.neurons[number]
            for name in ("gate_proj", "up_proj"):
                _take(getattr(mlp, name), 0, order)
            _take(mlp.down_proj, 1, order)
        if number in orders.values:
            inside = orders.values[number] + decoder.width * torch.arange(decoder.kv_heads)[:, None]
            _take(attention.v_proj, 0, inside.flatten())
            query_heads = torch.arange(decoder.kv_heads * decoder.group).view(decoder.kv_heads, decoder.group)
            spread = decoder.width * query_heads[:, :, None] + orders.values[number][:, None, :]
            _take(attention.o_proj, 1, spread.flatten())
        if number in orders.heads:
            heads = orders.heads[number] + decoder.group * torch.arange(decoder.kv_heads)[:, None]
            channels = (decoder.width * heads.flatten()[:, None] + torch.arange(decoder.width)).flatten()
            _take(attention.q_proj, 0, channels)
            _take(attention.o_proj, 1, channels)
    if orders.residual is not None:
        decoder.reorder_residual(orders.residual)


class _Decoder:
    """The parts of a Llama-like model that orders touch."""

    def __init__(self, model: nn.Module):
        inner: Any = getattr(model, "model", model)
        config: Any = getattr(model, "config", None)
        try:
            self.layers: list[Any] = list(inner.layers)
            self.embedding, self.norm = inner.embed_tokens, inner.norm
            self.hidden = int(config.hidden_size)
            self.kv_heads = int(config.num_key_value_heads)
            self.group = int(config.num_attention_heads) // self.kv_heads
            self.width = int(self.layers[0].self_attn.v_proj.weight.shape[0]) // self.kv_heads
            for layer in self.layers:
                for name in _ATTENTION:
                    self._require_linear(getattr(layer.self_attn, name))
                for name in _MLP:
                    self._require_linear(getattr(layer.mlp, name))
                self._require_norms(layer)
        except (AttributeError, TypeError, IndexError) as error:
            raise TensorNetError(
                f"{type(model).__name__} is not built like a Llama decoder ({error}); its free orders are not known"
            ) from error
        for number, layer in enumerate(self.layers):
            extra = {name for name, child in layer.named_children() if any(True for _ in child.parameters())} - _KNOWN_LAYER
            inside = {name for name, child in layer.self_attn.named_children() if any(True for _ in child.parameters())}
            extra |= inside - set(_ATTENTION)
            extra |= {name for part in (layer, layer.self_attn, layer.mlp) for name, _ in part.named_parameters(recurse=False)}
            if extra:
                raise TensorNetError(f"layer {number} has parts {sorted(extra)} whose axes are not known to follow an order")
        self.head: Any = getattr(model, "lm_head", None)
        self._require_own_weights()

    def _require_own_weights(self) -> None:
        """No weight of the layers is used twice: it would be reordered twice."""
        seen: dict[int, str] = {}
        for number, layer in enumerate(self.layers):
            for name, parameter in layer.named_parameters(remove_duplicate=False):
                place = f"layers.{number}.{name}"
                if id(parameter) in seen:
                    raise TensorNetError(f"{seen[id(parameter)]} and {place} are one weight, so that it cannot follow an order")
                seen[id(parameter)] = place

    @staticmethod
    def _require_linear(module: Any) -> None:
        if not isinstance(module, nn.Linear):
            raise AttributeError(f"found {type(module).__name__} where nn.Linear was expected")

    @staticmethod
    def _require_norms(layer: Any) -> None:
        for name in _NORMS:
            if getattr(layer, name).weight.ndim != 1:
                raise AttributeError(f"{name} has no weight per channel")

    def check(self, orders: FreeOrders) -> None:
        """All orders are permutations of their axes."""
        if orders.residual is not None:
            _check("residual", orders.residual[None], 1, self.hidden)
        for name, count, size in (
            ("neurons", 1, None),
            ("values", self.kv_heads, self.width),
            ("heads", self.kv_heads, self.group),
        ):
            for number, order in getattr(orders, name).items():
                if not 0 <= number < len(self.layers):
                    raise TensorNetError(f"{name} orders name layer {number}; the model has {len(self.layers)}")
                length = size or int(self.layers[number].mlp.down_proj.weight.shape[1])
                _check(f"{name} of layer {number}", order[None] if name == "neurons" else order, count, length)

    def reorder_residual(self, order: Tensor) -> None:
        """One order for everything that reads or writes the residual stream."""
        _take(self.embedding, 1, order)
        if self.head is not None and self.head.weight is not self.embedding.weight:
            _take(self.head, 1, order)
        _take(self.norm, 0, order)
        for layer in self.layers:
            for name in _NORMS:
                _take(getattr(layer, name), 0, order)
            for reader in (*(getattr(layer.self_attn, n) for n in _ATTENTION[:3]), layer.mlp.gate_proj, layer.mlp.up_proj):
                _take(reader, 1, order)
            for writer in (layer.self_attn.o_proj, layer.mlp.down_proj):
                _take(writer, 0, order)


def _check(name: str, order: Tensor, count: int, length: int) -> None:
    if order.shape != (count, length) or not torch.equal(order.sort(1)[0], torch.arange(length).expand(count, -1)):
        raise TensorNetError(f"the order of {name}, shape {tuple(order.shape)}, is not a permutation of {length} (x {count})")


def _take(module: Any, axis: int, order: Tensor) -> None:
    """Reorder an axis of a module's weight, and its bias with the outputs."""
    weight = module.weight
    weight.data = weight.data.index_select(axis, order.to(weight.device)).contiguous()
    bias = getattr(module, "bias", None)
    if axis == 0 and isinstance(bias, Tensor):
        bias.data = bias.data.index_select(0, order.to(bias.device))


@contextmanager
def reordered(model: nn.Module, orders: FreeOrders) -> Iterator[None]:
    """Inside, the model has these orders; afterwards its weights are the very tensors they were."""
    before = {name: parameter.data for name, parameter in model.named_parameters()}
    try:
        absorb_orders(model, orders)
        yield
    finally:
        for name, parameter in model.named_parameters():
            if name in before:
                parameter.data = before[name]
