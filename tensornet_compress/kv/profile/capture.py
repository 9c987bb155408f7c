"""Run a model over calibration windows and hand out its plain keys and values, and what the loss feels of their errors."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from transformers.cache_utils import DynamicCache, DynamicLayer, EncoderDecoderCache

from tensornet_compress.calibrate import check_vocabulary, model_inputs
from tensornet_compress.calibrate.hooks import frozen
from tensornet_compress.errors import TensorNetError
from tensornet_compress.kv.profile.felt import Felt, felt_by_outputs
from tensornet_compress.kv.rope import PositionRecorder, Rotary, is_encoder_decoder, rotary_module, rotary_style, text_config
from tensornet_compress.nn.finite import require_finite


@dataclass(frozen=True)
class Window:
    """One calibration window: ids and mask, int64 (batch, tokens), and what an encoder reads, each (batch, ...)."""

    ids: Tensor
    mask: Tensor
    encoder: dict[str, Tensor] = field(default_factory=dict)

    def rows(self) -> Iterator[Window]:
        """Its sequences one by one, without padding."""
        for row, mask in enumerate(self.mask):
            ids = self.ids[row][mask.bool()][None]
            yield Window(ids, torch.ones_like(ids), {name: part[row : row + 1] for name, part in self.encoder.items()})


@dataclass(frozen=True)
class Captured:
    """Plain keys and values of the compressed layers for the unpadded tokens of one sequence.

    ``keys``, ``values``: per layer, fp32 (heads, tokens, channels); keys without rotary positions. ``queries``: where they were
    asked for, per layer, fp32 (query heads, tokens, channels), also without; ``scaling``: what scores are multiplied by.
    ``felt``: where they were asked for and do not meet keys in a known way, per layer, gradients at its keys and values, each
    fp32 (heads, tokens, channels), see ``felt_by_outputs``.
    """

    layers: tuple[int, ...]
    keys: list[Tensor]
    values: list[Tensor]
    queries: list[Tensor] = field(default_factory=list)
    scaling: list[float] = field(default_factory=list)
    felt: list[tuple[Tensor, Tensor]] = field(default_factory=list)


Heard = list[tuple[Tensor, float]]
"""Layer by layer: queries as they met the keys, (batch, query heads, tokens, width), and the scale of scores."""


class _Listener(TorchFunctionMode):
    """Inside, every ``scaled_dot_product_attention`` leaves in ``heard`` what was asked."""

    def __init__(self, heard: Heard):
        super().__init__()
        self.heard = heard

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is scaled_dot_product_attention:
            query, scale = args[0] if args else kwargs["query"], kwargs.get("scale")
            self.heard.append((query.detach(), query.shape[-1] ** -0.5 if scale is None else float(scale)))
        return func(*args, **kwargs)


def windows(batches: Iterable[Any], paired: bool = False) -> Iterator[Window]:
    """Batches as callers give them (int64 ids, or mappings with ``input_ids`` and ``attention_mask``) -> windows.

    ``paired``: of a model with an encoder, whose batches are mappings of what it reads, ``decoder_input_ids`` and perhaps
    ``decoder_attention_mask``.

    Raises:
        TensorNetError: a batch is neither.
    """
    prefix = "decoder_" if paired else ""
    for batch in batches:
        inputs = model_inputs(batch, torch.device("cpu"))
        if f"{prefix}input_ids" not in inputs:
            raise TensorNetError(
                f"a cache is calibrated on integer {prefix}input_ids of shape (batch, length)"
                f"{' beside what the encoder reads' if paired else ''}, was given {list(inputs)}"
            )
        ids, mask = inputs[f"{prefix}input_ids"].long(), inputs.get(f"{prefix}attention_mask")
        encoder = {name: part for name, part in inputs.items() if paired and not str(name).startswith(prefix)}
        yield Window(ids, torch.ones_like(ids) if mask is None else mask.long(), encoder)


def full_attention_layers(cache: Any) -> tuple[int, ...]:
    """Indices of the layers of a filled ``DynamicCache`` that hold plain full-attention keys and values.

    Raises:
        TensorNetError: there are none.
    """
    layers = tuple(i for i, layer in enumerate(cache.layers) if type(layer) is DynamicLayer and layer.is_initialized)
    if not layers:
        raise TensorNetError("the model has no full-attention layer that caches keys and values; there is nothing to compress")
    return layers


def _attending(cache: Any) -> list[int]:
    """Indices of the layers of a filled cache that hold keys: all but those of linear attention and the like."""
    return [i for i, layer in enumerate(cache.layers) if getattr(layer, "keys", None) is not None]


def _meet(heard: Heard, cache: Any) -> bool:
    """Whether queries that were heard are those of the layers of a filled cache, and meet its keys as they are."""
    layers = [cache.layers[i] for i in _attending(cache)]
    return len(heard) == len(layers) and all(q.shape[-1] == layer.keys.shape[-1] for layer, (q, _) in zip(layers, heard))


def self_attention(cache: Any) -> Any:
    """What a decoder cached of itself."""
    return getattr(cache, "self_attention_cache", cache)


class Runner:
    """Runs one model on windows with a plain cache, with positions recorded. Use as a context manager."""

    def __init__(self, model: nn.Module):
        self.model = model
        self.paired = is_encoder_decoder(model)
        self.device = next(model.parameters()).device
        self.style = rotary_style(model)
        module = rotary_module(model)
        self.recorder = PositionRecorder(module) if module is not None and self.style is not None else None
        # Of a pair, what the encoder asks itself is heard too.
        self._feels = self.paired
        self._generator = torch.Generator().manual_seed(0)
        self._short = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._stack = ExitStack()

    def __enter__(self) -> Runner:
        require_finite(self.model)
        self._stack.enter_context(frozen(self.model))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()
        if self.recorder:
            self.recorder.close()

    def _read(self, ids: Tensor, positions: Tensor, past: Any, encoder: dict[str, Tensor], **more: Any) -> Any:
        """Run the model, or its decoder behind its encoder, on ids (batch, tokens) that follow ``past``."""
        if not self.paired:
            inputs = {"input_ids": ids.to(self.device), "position_ids": positions}
            return self.model(**inputs, past_key_values=past, use_cache=True, **more)
        given = {name: part.to(self.device) for name, part in encoder.items()}
        if "attention_mask" in more:
            more["decoder_attention_mask"] = more.pop("attention_mask")
        return self.model(**given, decoder_input_ids=ids.to(self.device), past_key_values=past, use_cache=True, **more)

    @torch.no_grad()
    def prefill(
        self,
        ids: Tensor,
        mask: Tensor,
        encoder: dict[str, Tensor] | None = None,
        listening: Callable[[Any], AbstractContextManager[Any]] | None = None,
    ) -> tuple[Any, Tensor]:
        """Run ids (batch, tokens); returns the filled cache and the positions (batch, tokens).

        ``encoder``: what the encoder reads, whose keys and values the cache then holds too. ``listening``: made from the empty
        cache, is around the run.
        """
        check_vocabulary(self.model, ids)
        own: Any = DynamicCache(config=text_config(self.model))
        extra = {"logits_to_keep": 1} if self._short else {}
        positions = (mask.cumsum(1) - 1).clamp_min(0).to(self.device)
        past = EncoderDecoderCache(own, DynamicCache(config=text_config(self.model))) if self.paired else own
        with nullcontext() if listening is None else listening(own):
            self._read(ids, positions, past, encoder or {}, attention_mask=mask.to(self.device), **extra)
        return past, positions

    def rotary(self) -> Rotary | None:
        """The rotation of the model's full-attention layers, if it has one."""
        return self.recorder.rotary(self.style) if self.recorder and self.style else None

    def plain(self, keys: Tensor, positions: Tensor) -> Tensor:
        """Keys (batch, heads, tokens, channels) at positions (batch, tokens) -> without rotary positions, fp32."""
        rotary = self.rotary()
        return keys.float() if rotary is None else rotary.unrotate(keys.float(), positions[:, None])

    def captured(
        self, cache: Any, positions: Tensor, mask: Tensor, heard: Heard | None = None, felt: Felt | None = None
    ) -> Iterator[Captured]:
        """One ``Captured`` per sequence of a filled cache; mask (batch, tokens).

        ``heard``: the queries of every layer; ``felt``: gradients at what every layer cached.
        """
        cache = self_attention(cache)
        layers = full_attention_layers(cache)
        plain = [self.plain(cache.layers[i].keys, positions) for i in layers]
        attending = _attending(cache)
        heard = [heard[attending.index(i)] for i in layers] if heard else []
        asked = [self.plain(query, positions) for query, _ in heard]
        gradients = [(self.plain(felt[i][0], positions), felt[i][1].float()) for i in layers] if felt else []
        for row, keep in enumerate(mask.bool().to(self.device)):
            yield Captured(
                layers,
                [keys[row][:, keep].cpu() for keys in plain],
                [cache.layers[i].values[row][:, keep].float().cpu() for i in layers],
                [queries[row][:, keep].cpu() for queries in asked],
                [scale for _, scale in heard],
                [(keys[row][:, keep].cpu(), values[row][:, keep].cpu()) for keys, values in gradients],
            )

    def capture(self, window: Window, queries: bool = False) -> Iterator[Captured]:
        """One ``Captured`` per sequence of the window, with what tells of its queries if wanted."""
        heard: Heard = []
        felt: Felt = {}
        cache, positions = None, window.mask
        if not (queries and self._feels):
            listener = (lambda _: _Listener(heard)) if queries else None
            cache, positions = self.prefill(window.ids, window.mask, window.encoder, listener)
            self._feels = queries and not _meet(heard, cache)
        if queries and self._feels:
            feeler = partial(felt_by_outputs, self.model, window.mask, self._generator, felt)
            cache, positions = self.prefill(window.ids, window.mask, window.encoder, feeler)
            heard = []
        yield from self.captured(cache, positions, window.mask, heard, felt)

    def sensitivity(
        self,
        cache: Any,
        positions: Tensor,
        continuations: Tensor,
        draws: int,
        generator: torch.Generator,
        encoder: dict[str, Tensor] | None = None,
    ) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
        """Gradients of the log-likelihood of sampled next tokens with respect to every cached key and value.

        Labels are drawn from the model, so outer products of these gradients estimate the Fisher information: the second-order
        cost of cache errors in KL divergence (2507.09428 for weights; here for the cache).

        Args:
            cache, positions: from ``prefill`` of one sequence, (1, tokens); used up.
            continuations: int64 (count, tokens), each read after the cached tokens. draws: label draws. encoder: what the
                encoder read.

        Yields:
            Per draw and layer, fp32 (heads, tokens, channels), for keys (without rotary positions) and for values.
        """
        leaves = []
        own = self_attention(cache)
        for i in full_attention_layers(own):
            layer = own.layers[i]
            layer.keys, layer.values = layer.keys.detach().requires_grad_(), layer.values.detach().requires_grad_()
            leaves += [layer.keys, layer.values]
        count, ahead = continuations.shape
        following = torch.arange(positions.shape[1], positions.shape[1] + ahead, device=self.device).expand(count, -1)
        with torch.enable_grad():
            cache.batch_repeat_interleave(count)
            again = {name: part.repeat_interleave(count, 0) for name, part in (encoder or {}).items()}
            logits = self._read(continuations, following, cache, again).logits
            log_probability = logits.float().log_softmax(-1).flatten(0, 1)
            for draw in range(draws):
                drawn = torch.multinomial(log_probability.detach().exp().cpu(), 1, generator=generator).to(self.device)
                total = log_probability.gather(1, drawn).sum() / ahead**0.5
                gradients = torch.autograd.grad(total, leaves, retain_graph=draw + 1 < draws)
                keys = [self.plain(g, positions)[0].cpu() for g in gradients[0::2]]
                yield keys, [g[0].float().cpu() for g in gradients[1::2]]
