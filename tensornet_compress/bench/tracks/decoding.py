"""Decoding with a full cache: ours, transformers' exact cache and its quantised ones; every cache holds the same tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tensornet_compress.bench.models import find_model
from tensornet_compress.bench.peers.caches.stock import ready
from tensornet_compress.bench.race import clock
from tensornet_compress.bench.side import Unavailable
from tensornet_compress.bench.speed import OURS, TRACKS, Heat, SpeedSettings, Timed, Track
from tensornet_compress.bench.texts import find_text

NAMES = (OURS, "ours-rebuild", "dense", "quantized-quanto", "quantized-hqq")
BITS = 3.0
WINDOWS, LENGTH = 5, 256


def heats(settings: SpeedSettings) -> Iterator[Heat]:
    """One: after ``context`` tokens."""
    yield Heat(f"decoding after {settings.context} tokens, batch 1", NAMES, lambda: _decode(settings))


@torch.no_grad()
def _decode(settings: SpeedSettings) -> Timed:
    from transformers import DynamicCache, QuantizedCache

    from tensornet_compress.kv.live.cache import LiveCache
    from tensornet_compress.kv.profile.calibrate import calibrate

    source, text = find_model(settings.model), find_text(settings.text)
    model, tokenizer = source.load(), source.tokenizer()
    windows = text.windows(tokenizer, "calibration", LENGTH, WINDOWS)
    # Speed does not depend on how good the bases are: a small Euclidean profile stands for any other.
    with torch.enable_grad():
        profile = calibrate(model, windows.split(1), metric="euclidean", joined=0, search=False)
    needed = settings.context + settings.steps + 1
    count = -(-needed // LENGTH)
    ids = text.windows(tokenizer, "heldout", LENGTH, count).flatten()[:needed]
    exact: Any = DynamicCache(config=model.config)
    model(ids[None, : settings.context], past_key_values=exact, logits_to_keep=1)
    states = [(layer.keys, layer.values) for layer in exact.layers]
    makers: dict[str, Callable[[], Any]] = {
        OURS: lambda: LiveCache(model, BITS, profile),
        "ours-rebuild": lambda: LiveCache(model, BITS, profile, attention="rebuild"),
        "dense": lambda: DynamicCache(config=model.config),
    }
    missing = {}
    for name, backend, more in (("quantized-quanto", "quanto", {}), ("quantized-hqq", "hqq", {"axis_key": 1, "axis_value": 1})):
        try:
            ready(backend)
            makers[name] = partial(QuantizedCache, backend, model.config, nbits=4, **more)
        except Unavailable as reason:
            missing[name] = str(reason)
    seconds: dict[str, list[float]] = {name: [] for name in makers}
    rounds = max(1, settings.rounds // 4)
    for number in range(rounds):
        for name in list(makers) if number % 2 else list(makers)[::-1]:
            seconds[name] += _steps(model, _filled(makers[name](), states), ids[settings.context :])
    medians = {name: float(torch.tensor(values).median()) for name, values in seconds.items()}
    return Timed(medians, missing, tokens=1, settings={"bits": BITS, "stock_bits": 4, "rounds": rounds})


def _filled(cache: Any, states: list[tuple[Tensor, Tensor]]) -> Any:
    """Hand a cache the states of a prompt, as a forward pass would."""
    recorder = getattr(cache, "recorder", None)
    if recorder is not None:
        recorder.seen["positions"] = torch.arange(states[0][0].shape[2])[None]
    for index, (keys, values) in enumerate(states):
        cache.update(keys, values, index)
    return cache


def _steps(model: Any, cache: Any, tokens: Tensor) -> list[float]:
    """Seconds of each single-token step but the first."""
    read = clock()
    seconds = []
    for token in tokens:
        began = read()
        model(token.view(1, 1), past_key_values=cache, logits_to_keep=1)
        seconds.append(read() - began)
    return seconds[1:]


TRACKS.add(Track("decoding", heats))
