"""Held-out contexts whose middle is coded, and what the model answers when it reads on with the coded cache."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from tensornet_compress.kv.profile.capture import Runner


@dataclass(frozen=True)
class Reading:
    """``context`` tokens are cached, of which ``sinks`` and the last ``window`` stay exact; then ``ahead`` tokens are read."""

    context: int = 1024
    ahead: int = 128
    sinks: int = 4
    window: int = 64

    @property
    def body(self) -> slice:
        """The tokens that are coded."""
        return slice(self.sinks, self.context - self.window)

    def copied_span(self, index: int) -> slice:
        """A far span of document ``index``, to be copied verbatim after the context."""
        first = min(64, self.context // 8)
        last = max(first + 1, self.context - self.window - 2 * self.ahead - 4)
        start = int(torch.randint(first, last, (1,), generator=torch.Generator().manual_seed(index)))
        return slice(start, start + self.ahead)


@dataclass
class Document:
    """A held-out context with its plain states, and two continuations with exact log-probabilities.

    ``keys``, ``values``: per layer fp32 (heads, tokens, width), rotary positions off.
    """

    ids: Tensor
    keys: list[Tensor]
    values: list[Tensor]
    continuations: dict[str, Tensor]
    exact: dict[str, Tensor]
    attention: dict[str, list[Tensor]]


@torch.no_grad()
def documents(model: Any, windows: Tensor, reading: Reading) -> list[Document]:
    """Windows (count, context + ahead), each with its natural continuation and a verbatim copy of a far span of itself."""
    made = []
    with Runner(model) as runner:
        for index, window in enumerate(windows):
            ids, following = window[: reading.context], window[reading.context :]
            cache, positions = runner.prefill(ids[None], torch.ones(1, reading.context, dtype=torch.int64))
            keys = [runner.plain(layer.keys, positions)[0] for layer in cache.layers]
            values = [layer.values[0].float() for layer in cache.layers]
            copied = ids[reading.copied_span(index)]
            document = Document(ids, keys, values, {"natural": following, "copy": copied}, {}, {})
            for name, (log_probability, attention) in read_on(model, keys, values, document.continuations).items():
                document.exact[name], document.attention[name] = log_probability, attention
            made.append(document)
    return made


@torch.no_grad()
def read_on(
    model: Any, keys: list[Tensor], values: list[Tensor], continuations: dict[str, Tensor]
) -> dict[str, tuple[Tensor, list[Tensor]]]:
    """Per continuation, read with these plain states cached: log-probabilities (tokens, vocabulary), attention outputs."""
    with Runner(model) as runner:
        rotary = runner.rotary()
    positions = torch.arange(keys[0].shape[1])
    count = len(continuations)
    pairs = [(k if rotary is None else rotary.rotate(k, positions), v) for k, v in zip(keys, values)]
    cache = DynamicCache([tuple(t.expand(count, -1, -1, -1) for t in pair) for pair in pairs])
    ids = torch.stack(list(continuations.values()))
    out, attention = attention_outputs(model, lambda: model(ids, past_key_values=cache))
    return {
        name: (out.logits[row].float().log_softmax(-1), [a[row] for a in attention]) for row, name in enumerate(continuations)
    }


def attention_outputs(model: Any, call: Callable[[], Any]) -> tuple[Any, list[Tensor]]:
    """Run ``call`` and collect the output of every attention module."""
    found: list[Tensor] = []
    handles = [
        module.register_forward_hook(lambda _m, _a, out: found.append(out[0].detach()))
        for name, module in model.named_modules()
        if name.endswith("self_attn")
    ]
    try:
        return call(), found
    finally:
        for handle in handles:
            handle.remove()
