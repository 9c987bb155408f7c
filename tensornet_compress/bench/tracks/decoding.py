"""Caches in use: decoding with a full one, coding and decoding of blocks, and memory; ours beside those of transformers."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

import tensornet_compress.kv as kv
from tensornet_compress.bench.models import find_model
from tensornet_compress.bench.peer_packages import Unavailable
from tensornet_compress.bench.peers.stock_caches import ready
from tensornet_compress.bench.processes import apart, resident
from tensornet_compress.bench.speed_case import (
    OURS,
    TRACKS,
    Heat,
    Raced,
    SpeedSettings,
    Track,
    clock,
    on_threads,
    race,
    thread_counts,
)
from tensornet_compress.bench.texts import Part, find_text
from tensornet_compress.kv.live.cache import LiveCache
from tensornet_compress.kv.storage.codec import JointCodec

EXACT, STOCK = "dense", {"quantized-quanto": {}, "quantized-hqq": {"axis_key": 1, "axis_value": 1}}
CONTRACTED = (OURS, "ours-2-bits")
OURS_TIMED = (*CONTRACTED, "ours-rebuild", "ours-storage")
BITS, STOCK_BITS = 3.0, 4
WINDOWS, LENGTH, UNIT, UNITS = 5, 256, 64, 3
CODED, RATES = 1024, (4.0, 2.0, 1.0)
MEMORY = (EXACT, *CONTRACTED, "ours-storage")
States = list[tuple[Tensor, Tensor]]


@dataclass
class Caches:
    """A model, the states of a context, and empty caches of every kind. ``folder``: of a profile, if there is one."""

    settings: SpeedSettings
    context: int
    folder: str | None = None

    @cached_property
    def model(self) -> Any:
        """The model in fp32."""
        return find_model(self.settings.model).load()

    @cached_property
    def profile(self) -> kv.Profile:
        """A small Euclidean profile: how good its bases are makes no difference to speed and memory."""
        if self.folder is not None:
            return kv.Profile.load(self.folder)
        windows = self._windows("calibration", WINDOWS)
        return kv.calibrate(self.model, windows.split(1), metric="euclidean", joined=0, search=False)

    @cached_property
    def ids(self) -> Tensor:
        """Held-out tokens: the context and those that are decoded."""
        needed = self.context + max(self.settings.steps + 1, UNIT)
        return self._windows("heldout", -(-needed // LENGTH)).flatten()[:needed]

    def _windows(self, part: Part, count: int) -> Tensor:
        return find_text(self.settings.text).windows(find_model(self.settings.model).tokenizer(), part, LENGTH, count)

    @cached_property
    def states(self) -> States:
        """Keys and values of the context by layer."""
        exact = self.make(EXACT)
        with torch.no_grad():
            self.model(self.ids[None, : self.context], past_key_values=exact, logits_to_keep=1)
        return [(layer.keys, layer.values) for layer in exact.layers]

    def make(self, name: str, bits: float | None = None) -> Any:
        """An empty cache of a kind, at the rate that the tracks time it at by default. Raises ``Unavailable`` where its
        package is not installed."""
        from transformers import DynamicCache, QuantizedCache

        if name == EXACT:
            return DynamicCache(config=self.model.config)
        if name in STOCK:
            backend = name.removeprefix("quantized-")
            ready(backend)
            return QuantizedCache(backend, self.model.config, nbits=int(bits or STOCK_BITS), **STOCK[name])
        if name == "ours-storage":
            return kv.CompressedCache(self.model, bits or 2.0, self.profile, mode="storage")
        rate = bits or (2.0 if name == "ours-2-bits" else BITS)
        return LiveCache(self.model, rate, self.profile, attention="rebuild" if name == "ours-rebuild" else "auto")


def fill(cache: Any, states: States, start: int = 0, count: int | None = None) -> Any:
    """Hand a cache the first tokens of states (all of them by default), as a forward pass at position ``start`` would."""
    recorder = getattr(cache, "recorder", None)
    if recorder is not None:
        recorder.seen["positions"] = torch.arange(start, start + (count or states[0][0].shape[2]))[None]
    for index, (keys, values) in enumerate(states):
        cache.update(keys[:, :, :count], values[:, :, :count], index)
    return cache


def decoding(settings: SpeedSettings) -> Iterator[Heat]:
    """After ``context`` tokens, in full runs also after twice as many; on all threads, and on 1."""
    names = (*OURS_TIMED, EXACT, *STOCK)
    for context in (settings.context,) if settings.quick else (settings.context, 2 * settings.context):
        for threads in reversed(thread_counts()):
            subject = f"decoding after {context} tokens, batch 1" + (", 1 thread" if threads == 1 else "")
            yield Heat(subject, names, partial(_decode_on, settings, names, context, threads))


def _decode_on(settings: SpeedSettings, names: tuple[str, ...], context: int, threads: int) -> Raced:
    with on_threads(threads):
        return _decode(settings, names, context)


def _decode(settings: SpeedSettings, names: tuple[str, ...], context: int) -> Raced:
    caches = Caches(settings, context)
    values: dict[str, dict[str, float]] = {}
    missing: dict[str, str] = {}
    for name in names:
        try:
            values[name] = {"prefill": _prefill(caches, name), "sealing": _sealing(caches, name)}
        except Unavailable as reason:
            missing[name] = str(reason)
    seconds: dict[str, list[float]] = {name: [] for name in values}
    rounds = max(1, settings.rounds // 8)
    for number in range(rounds):
        for name in list(values) if number % 2 else list(values)[::-1]:
            seconds[name] += _steps(caches, name)
    for name, times in seconds.items():
        values[name] |= {"time": median(times), "tokens_per_second": 1 / median(times)}
    return Raced(values, missing, {"bits": BITS, "stock_bits": STOCK_BITS, "rounds": rounds})


@torch.no_grad()
def _prefill(caches: Caches, name: str) -> float:
    """Seconds of one forward pass over the context."""
    cache, began = caches.make(name), perf_counter()
    caches.model(caches.ids[None, : caches.context], past_key_values=cache, logits_to_keep=1)
    return perf_counter() - began


@torch.no_grad()
def _sealing(caches: Caches, name: str) -> float:
    """Seconds for each of the tokens of further units that a full cache takes in."""
    cache = fill(caches.make(name), caches.states)
    seconds = []
    for unit in range(UNITS):
        began = perf_counter()
        fill(cache, caches.states, caches.context + unit * UNIT, UNIT)
        seconds.append((perf_counter() - began) / UNIT)
    return median(seconds)


@torch.no_grad()
def _steps(caches: Caches, name: str) -> list[float]:
    """Seconds of each single-token step but the first."""
    cache, read = fill(caches.make(name), caches.states), clock()
    seconds = []
    for token in caches.ids[caches.context : caches.context + caches.settings.steps + 1]:
        began = read()
        caches.model(token.view(1, 1), past_key_values=cache, logits_to_keep=1)
        seconds.append(read() - began)
    return seconds[1:]


def coding(settings: SpeedSettings) -> Iterator[Heat]:
    """The storage code of a block of tokens, at several rates."""
    tokens = min(CODED, settings.context)
    for bits in RATES[1:2] if settings.quick else RATES:
        subject = f"storage code of {tokens} tokens at {bits:g} bits"
        yield Heat(subject, ("ours-encode", "ours-decode"), partial(_code, settings, bits, tokens))


def _code(settings: SpeedSettings, bits: float, tokens: int) -> Raced:
    caches = Caches(settings, tokens)
    codec = JointCodec(caches.profile, bits)
    keys, values = ([layer[side][0] for layer in caches.states] for side in (0, 1))
    payload = codec.encode(keys, values)
    calls = {"ours-encode": lambda: codec.encode(keys, values), "ours-decode": lambda: codec.decode(payload)}
    times = race(calls, max(1, settings.rounds // 8))
    return Raced({name: {"time": time, "tokens_per_second": tokens / time} for name, time in times.items()})


def memory(settings: SpeedSettings) -> Iterator[Heat]:
    """What a cache of ``context`` tokens holds, by its own count and as the system sees it."""
    yield Heat(f"memory of {settings.context} tokens, batch 1", MEMORY, lambda: _memory(settings))


def _memory(settings: SpeedSettings) -> Raced:
    values: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        Caches(settings, settings.context).profile.save(folder)
        for name in MEMORY:
            held, grown = apart(_grown, settings, folder, name)
            values[name] = {"held_nbytes": held, "grown_nbytes": grown}
            values[name]["held_share"] = held / values[EXACT]["held_nbytes"]
            values[name]["grown_share"] = grown / values[EXACT]["grown_nbytes"]
    return Raced(values, settings={"bits": BITS})


@torch.no_grad()
def _grown(settings: SpeedSettings, folder: str, name: str) -> tuple[float, float]:
    """Bytes that a cache counts, and by how many this process grew. It is filled chunk by chunk, as forward passes would, with
    the states of one chunk: what they are does not matter here."""
    chunk = min(512, settings.context)
    caches = Caches(settings, chunk, folder)

    def filled(context: int) -> Any:
        cache = caches.make(name)
        for start in range(0, context, chunk):
            fill(cache, caches.states, start, min(chunk, context - start))
        for token in caches.ids[chunk : chunk + 2]:
            caches.model(token.view(1, 1), past_key_values=cache, logits_to_keep=1)
        return cache

    # The machine code of compiled loops is no part of a cache.
    filled(min(2 * chunk, settings.context))
    before = resident()
    cache = filled(settings.context)
    if name == "ours-storage":
        cache.freeze()
    grown = resident() - before
    counted = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers) if name == EXACT else cache.nbytes
    return float(counted), float(grown)


for _track in (Track("decoding", decoding), Track("coding", coding), Track("memory", memory)):
    TRACKS.add(_track)
