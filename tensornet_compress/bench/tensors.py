"""Tensors that searches run on: layers of both bundled models, embeddings, cached keys, a photograph and fields."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from tensornet_compress.bench.fields import heat_field, image, wave_field
from tensornet_compress.bench.registry import Registry
from tensornet_compress.errors import TensorNetError
from tensornet_compress.inputs import heldout_windows, load_causal_lm, load_encoder, load_tokenizer
from tensornet_compress.inputs.tensors import read_tensor

LAYER, BLOCK, TOKENS, KEYS = 10, 3, 4096, 256


@dataclass(frozen=True)
class BenchTensor:
    """``make``: the tensor. ``tolerance``: its errors are the asked ones times this; smooth fields are wanted more exactly.
    ``quick``: whether quick runs take it."""

    name: str
    title: str
    make: Callable[[], Tensor]
    tolerance: float = 1.0
    quick: bool = False

    def load(self) -> Tensor:
        """The tensor in fp32, contiguous."""
        return self.make().detach().float().contiguous()


TENSORS: Registry[BenchTensor] = Registry("tensor")


def from_file(file: str) -> BenchTensor:
    """``FILE.npy``, an image or ``FILE.safetensors:NAME``; read at once, so that a bad file ends the command.

    Raises:
        TensorNetError: it cannot be read, has no axes or no entries, or an entry is not finite.
    """
    tensor = read_tensor(file)
    if tensor.ndim == 0 or tensor.numel() == 0:
        raise TensorNetError(f"{file!r} holds a tensor of shape {tuple(tensor.shape)}; there is nothing to search")
    if not bool(tensor.isfinite().all()):
        raise TensorNetError(f"{file!r} holds NaN or infinite entries; give finite numbers")
    return BenchTensor(file, file, lambda: tensor)


def find_tensor(name: str) -> BenchTensor:
    """A registered tensor, or a file."""
    return TENSORS[name] if name in TENSORS else from_file(name)


@cache
def _language_model() -> Any:
    return load_causal_lm("smollm2-135m")


@cache
def _encoder() -> Any:
    return load_encoder("all-minilm-l6-v2")


def _smollm2(path: str) -> Tensor:
    weight: Tensor = _language_model().model.layers[LAYER].get_submodule(path).weight
    return weight


def _minilm(path: str) -> Tensor:
    weight: Tensor = _encoder().encoder.layer[BLOCK].get_submodule(path).weight
    return weight


def _smollm2_embeddings() -> Tensor:
    weight: Tensor = _language_model().model.embed_tokens.weight
    return weight[:TOKENS]


def _minilm_embeddings() -> Tensor:
    weight: Tensor = _encoder().embeddings.word_embeddings.weight
    return weight[:TOKENS]


@torch.no_grad()
def _keys() -> Tensor:
    """Keys of one layer for the opening of a held-out article: (heads, tokens, channels), rotary positions on."""
    windows = heldout_windows(load_tokenizer("smollm2-135m"), 512, 1)
    keys: Tensor = _language_model()(windows[:, :KEYS], use_cache=True).past_key_values.layers[LAYER].keys
    return keys[0]


for _kind, _path in (
    ("q_proj", "self_attn.q_proj"),
    ("k_proj", "self_attn.k_proj"),
    ("v_proj", "self_attn.v_proj"),
    ("o_proj", "self_attn.o_proj"),
    ("gate_proj", "mlp.gate_proj"),
    ("up_proj", "mlp.up_proj"),
    ("down_proj", "mlp.down_proj"),
):
    TENSORS.add(BenchTensor(f"smollm2-{_kind}", f"SmolLM2 {_kind}", partial(_smollm2, _path), quick=_kind == "k_proj"))
TENSORS.add(BenchTensor("smollm2-embeddings", f"SmolLM2 embeddings, first {TOKENS} tokens", _smollm2_embeddings))
for _kind, _title, _path in (
    ("query", "query", "attention.self.query"),
    ("key", "key", "attention.self.key"),
    ("value", "value", "attention.self.value"),
    ("attention-output", "attention output", "attention.output.dense"),
    ("intermediate", "intermediate", "intermediate.dense"),
    ("output", "output", "output.dense"),
):
    TENSORS.add(BenchTensor(f"minilm-{_kind}", f"MiniLM {_title}", partial(_minilm, _path)))
TENSORS.add(BenchTensor("minilm-embeddings", f"MiniLM embeddings, first {TOKENS} tokens", _minilm_embeddings))
TENSORS.add(BenchTensor("kv-keys", f"KV cache, keys of {KEYS} tokens", _keys))
TENSORS.add(BenchTensor("image", "image (china.jpg, 96 x 128 x 3)", image, quick=True))
TENSORS.add(BenchTensor("wave", "wave field (32 x 32 x 32)", partial(wave_field, 32), 0.1, quick=True))
TENSORS.add(BenchTensor("heat", "heat field (32 x 32 x 32)", partial(heat_field, 32), 0.1, quick=True))
