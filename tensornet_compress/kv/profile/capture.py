"""Run a model over calibration windows and hand out its plain keys and values, and what the loss feels of their errors."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tensornet_compress.errors import TensorNetError
from tensornet_compress.kv.profile.queries import listening
from tensornet_compress.kv.rope import PositionRecorder, Rotary, rotary_module, rotary_style, text_config


@dataclass(frozen=True)
class Window:
    """One calibration window: ids and mask, int64 (batch, tokens)."""

    ids: Tensor
    mask: Tensor


@dataclass(frozen=True)
class Captured:
    """Plain keys and values of the compressed layers for the unpadded tokens of one sequence.

    ``keys``, ``values``: per layer, fp32 (heads, tokens, channels); keys without rotary positions. ``queries``: where they were
    asked for, per layer, fp32 (query heads, tokens, channels), also without; ``scaling``: what scores are multiplied by.
    """

    layers: tuple[int, ...]
    keys: list[Tensor]
    values: list[Tensor]
    queries: list[Tensor] = field(default_factory=list)
    scaling: list[float] = field(default_factory=list)


def windows(batches: Iterable[Any]) -> Iterator[Window]:
    """Batches as callers give them -> windows.

    Raises:
        TensorNetError: a batch is neither int64 ids (batch, length) nor a mapping with ``input_ids``.
    """
    for batch in batches:
        ids = batch if isinstance(batch, Tensor) else batch.get("input_ids") if hasattr(batch, "get") else None
        if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.is_floating_point():
            raise TensorNetError(
                f"a calibration batch must be int64 ids (batch, length) or a mapping with input_ids, was given {type(batch)}"
            )
        mask = None if isinstance(batch, Tensor) else batch.get("attention_mask")
        yield Window(ids.long(), torch.ones_like(ids) if mask is None else mask.long())


def full_attention_layers(cache: Any) -> tuple[int, ...]:
    """Indices of the layers of a filled ``DynamicCache`` that hold plain full-attention keys and values."""
    from transformers.cache_utils import DynamicLayer

    return tuple(i for i, layer in enumerate(cache.layers) if type(layer) is DynamicLayer and layer.is_initialized)


class Runner:
    """Runs one model on windows with a plain cache, with positions recorded. Use as a context manager."""

    def __init__(self, model: nn.Module):
        self.model = model
        self.device = next(model.parameters()).device
        self.style = rotary_style(model)
        module = rotary_module(model)
        self.recorder = PositionRecorder(module) if module is not None and self.style is not None else None
        self._short = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._training = model.training
        self._grad = [(p, p.requires_grad) for p in model.parameters()]

    def __enter__(self) -> Runner:
        self.model.eval()
        for parameter, _ in self._grad:
            parameter.requires_grad_(False)
        return self

    def __exit__(self, *_: object) -> None:
        self.model.train(self._training)
        for parameter, wanted in self._grad:
            parameter.requires_grad_(wanted)
        if self.recorder:
            self.recorder.close()

    @torch.no_grad()
    def prefill(self, ids: Tensor, mask: Tensor) -> tuple[Any, Tensor]:
        """Run ids (batch, tokens); returns the filled cache and the positions (batch, tokens)."""
        from transformers import DynamicCache

        cache = DynamicCache(config=text_config(self.model))
        extra = {"logits_to_keep": 1} if self._short else {}
        positions = (mask.cumsum(1) - 1).clamp_min(0).to(self.device)
        self.model(
            input_ids=ids.to(self.device),
            attention_mask=mask.to(self.device),
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            **extra,
        )
        return cache, positions

    def rotary(self) -> Rotary | None:
        """The rotation of the model's full-attention layers, if it has one."""
        return self.recorder.rotary(self.style) if self.recorder and self.style else None

    def plain(self, keys: Tensor, positions: Tensor) -> Tensor:
        """Keys (batch, heads, tokens, channels) at positions (batch, tokens) -> without rotary positions, fp32."""
        rotary = self.rotary()
        return keys.float() if rotary is None else rotary.unrotate(keys.float(), positions[:, None])

    def captured(
        self, cache: Any, positions: Tensor, mask: Tensor, heard: dict[int, tuple[Tensor, float]] | None = None
    ) -> Iterator[Captured]:
        """One ``Captured`` per sequence of a filled cache; mask (batch, tokens); ``heard`` as from ``queries.listening``."""
        layers = full_attention_layers(cache)
        if not layers:
            raise TensorNetError(
                "the model has no full-attention layer that caches keys and values; there is nothing to compress"
            )
        plain = [self.plain(cache.layers[i].keys, positions) for i in layers]
        asked = [self.plain(heard[i][0], positions) for i in layers] if heard else []
        for row, keep in enumerate(mask.bool().to(self.device)):
            yield Captured(
                layers,
                [keys[row][:, keep].cpu() for keys in plain],
                [cache.layers[i].values[row][:, keep].float().cpu() for i in layers],
                [queries[row][:, keep].cpu() for queries in asked],
                [heard[i][1] for i in layers] if heard else [],
            )

    def capture(self, window: Window, queries: bool = False) -> Iterator[Captured]:
        """One ``Captured`` per sequence of the window, with its queries if wanted."""
        heard: dict[int, tuple[Tensor, float]] = {}
        with listening(self.model, heard) if queries else nullcontext():
            cache, positions = self.prefill(window.ids, window.mask)
        yield from self.captured(cache, positions, window.mask, heard)

    def sensitivity(
        self, cache: Any, positions: Tensor, continuations: Tensor, draws: int, generator: torch.Generator
    ) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
        """Gradients of the log-likelihood of sampled next tokens with respect to every cached key and value.

        Labels are drawn from the model, so outer products of these gradients estimate the Fisher information: the second-order
        cost of cache errors in KL divergence (2507.09428 for weights; here for the cache).

        Args:
            cache, positions: from ``prefill`` of one sequence, (1, tokens); used up.
            continuations: int64 (count, tokens), each read after the cached tokens. draws: label draws.

        Yields:
            Per draw and layer, fp32 (heads, tokens, channels), for keys (without rotary positions) and for values.
        """
        leaves = []
        for i in full_attention_layers(cache):
            layer = cache.layers[i]
            layer.keys, layer.values = layer.keys.detach().requires_grad_(), layer.values.detach().requires_grad_()
            leaves += [layer.keys, layer.values]
        count, ahead = continuations.shape
        following = torch.arange(positions.shape[1], positions.shape[1] + ahead, device=self.device).expand(count, -1)
        with torch.enable_grad():
            cache.batch_repeat_interleave(count)
            logits = self.model(
                input_ids=continuations.to(self.device), position_ids=following, past_key_values=cache, use_cache=True
            ).logits
            log_probability = logits.float().log_softmax(-1).flatten(0, 1)
            for draw in range(draws):
                drawn = torch.multinomial(log_probability.detach().exp().cpu(), 1, generator=generator).to(self.device)
                total = log_probability.gather(1, drawn).sum() / ahead**0.5
                gradients = torch.autograd.grad(total, leaves, retain_graph=draw + 1 < draws)
                keys = [self.plain(g, positions)[0].cpu() for g in gradients[0::2]]
                yield keys, [g[0].float().cpu() for g in gradients[1::2]]
