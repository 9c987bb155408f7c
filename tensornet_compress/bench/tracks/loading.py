"""Seconds to open a saved model, with all hashes checked and without, beside transformers' loading of the dense one."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

import tensornet_compress as tnc
from tensornet_compress.bench.speed_case import OURS, TRACKS, Heat, Raced, SpeedSettings, Track, on_threads, race, thread_counts
from tensornet_compress.nn import find_targets
from tensornet_compress.nn.plan import LayerPlan, Plan, keep_plan
from tensornet_compress.nn.replace import replace_module
from tensornet_compress.tensor import TensorNetwork

UNCHECKED = "ours-unchecked"
NAMES = (OURS, UNCHECKED, "dense")
FULL, QUICK = (768, 14), (96, 2)
"""Width and blocks of a random Llama; in full runs a hundred million weights."""
FORMATS: dict[str, dict[str, Any]] = {
    "8-bit groups": {"budget": tnc.Budget(bits_per_weight=8.5), "formats": "compressed-tensors"},
    "entropy-coded integers": {"budget": tnc.Budget(bits_per_weight=3.5), "method": "coded"},
}


def loading(settings: SpeedSettings) -> Iterator[Heat]:
    """A random Llama in groups and in entropy-coded integers; on all threads by the wall clock, on 1 in processor time."""
    width, blocks = QUICK if settings.quick else FULL
    for threads in thread_counts():
        for how in FORMATS:
            subject = f"opening {blocks} blocks of width {width} in {how}, {threads} threads"
            yield Heat(subject, NAMES, partial(_load, settings, (width, blocks), how, threads))


def _load(settings: SpeedSettings, size: tuple[int, int], how: str, threads: int) -> Raced:
    from transformers import AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as folder:
        dense, small = Path(folder) / "dense", Path(folder) / "small"
        model = _llama(settings.seed, *size)
        model.save_pretrained(dense)
        tnc.save(_compressed(model, _llama(settings.seed, size[0], 1), FORMATS[how]), small)
        calls: dict[str, Callable[[], object]] = {
            OURS: lambda: tnc.load(small),
            UNCHECKED: lambda: tnc.load(small, verify=False),
            "dense": lambda: AutoModelForCausalLM.from_pretrained(dense),
        }
        with on_threads(threads):
            times = race(calls, settings.rounds)
        nbytes = sum(path.stat().st_size for path in small.iterdir())
    return Raced({name: {"time": time} for name, time in times.items()}, settings={"threads": threads, "file_nbytes": nbytes})


def _llama(seed: int, width: int, blocks: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=blocks,
        vocab_size=2000,
        num_attention_heads=width // 32,
    )
    return LlamaForCausalLM(config).eval()


def _compressed(model: Any, single: Any, how: dict[str, Any]) -> Any:
    """The model with the networks of one block in every block: how long they take to open does not depend on what they hold."""
    tnc.compress(single, allocator="energy", targets=["model.layers.*"], **how)
    layers = {}
    for target in find_targets(model)[0]:
        first = single.get_submodule(target.name.replace(f".{target.name.split('.')[2]}.", ".0.", 1))
        stored = {name: part.clone() for name, part in first.stored().items()}
        replace_module(model, target.name, TensorNetwork(first.spec, stored))
        layers[target.name] = LayerPlan(kind="linear", spec=first.spec)
    keep_plan(model, Plan(layers=layers))
    return model


TRACKS.add(Track("loading", loading))
