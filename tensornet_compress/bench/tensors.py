"""Tensors that searches run on: layers of both bundled models, embeddings, cached keys, images and fields."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tensornet_compress.bench.fields import (
    brain,
    burgers,
    elevation,
    heat_field,
    image,
    photo,
    spots,
    turbulence,
    vortices,
    wave_field,
)
from tensornet_compress.bench.registry import Registry
from tensornet_compress.errors import TensorNetError
from tensornet_compress.inputs import heldout_windows, load_causal_lm, load_encoder, load_tokenizer
from tensornet_compress.inputs.tensors import read_tensor

LANGUAGE, ENCODER = "smollm2-135m", "all-minilm-l6-v2"
LAYER, BLOCK, TOKENS, KEYS = 10, 3, 4096, 256


@dataclass(frozen=True)
class BenchTensor:
    """``make``: the tensor. ``errors``: relative errors that it is wanted at, of quick runs the first; smooth fields are wanted
    more exactly. ``quick``: whether quick runs take it."""

    name: str
    title: str
    make: Callable[[], Tensor]
    errors: tuple[float, ...] = (0.1, 0.3)
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
    """A registered tensor, or a file.

    Raises:
        TensorNetError: neither.
    """
    file = name not in TENSORS and (bool(Path(name).suffix) or Path(name).exists())
    return from_file(name) if file else TENSORS[name]


@cache
def _model(name: str) -> Any:
    return load_causal_lm(name) if name == LANGUAGE else load_encoder(name)


def weight_of(model: str, path: str, rows: int | None = None) -> Tensor:
    """The weight of a module of a bundled model, or its first ``rows``."""
    weight: Tensor = _model(model).get_submodule(path).weight
    return weight[:rows]


@torch.no_grad()
def _keys() -> Tensor:
    """Keys of one layer for the opening of a held-out article: (heads, tokens, channels), rotary positions on."""
    windows = heldout_windows(load_tokenizer(LANGUAGE), 512, 1)
    keys: Tensor = _model(LANGUAGE)(windows[:, :KEYS], use_cache=True).past_key_values.layers[LAYER].keys
    return keys[0]


for _path in (
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj",
    "mlp.down_proj",
):  # fmt: skip
    _kind = _path.partition(".")[2]
    _layer = partial(weight_of, LANGUAGE, f"model.layers.{LAYER}.{_path}")
    TENSORS.add(BenchTensor(f"smollm2-{_kind}", f"SmolLM2 {_kind}", _layer, quick=_kind == "k_proj"))
_embeddings = partial(weight_of, LANGUAGE, "model.embed_tokens", TOKENS)
TENSORS.add(BenchTensor("smollm2-embeddings", f"SmolLM2 embeddings, first {TOKENS} tokens", _embeddings))
for _title, _path in (
    ("query", "attention.self.query"),
    ("key", "attention.self.key"),
    ("value", "attention.self.value"),
    ("attention output", "attention.output.dense"),
    ("intermediate", "intermediate.dense"),
    ("output", "output.dense"),
):
    _layer = partial(weight_of, ENCODER, f"encoder.layer.{BLOCK}.{_path}")
    TENSORS.add(BenchTensor(f"minilm-{_title.replace(' ', '-')}", f"MiniLM {_title}", _layer))
_embeddings = partial(weight_of, ENCODER, "embeddings.word_embeddings", TOKENS)
TENSORS.add(BenchTensor("minilm-embeddings", f"MiniLM embeddings, first {TOKENS} tokens", _embeddings))
TENSORS.add(BenchTensor("kv-keys", f"KV cache, keys of {KEYS} tokens", _keys))
TENSORS.add(BenchTensor("image", "image (china.jpg, 96 x 128 x 3)", image, quick=True))
_FIELD, _PICTURE = (0.01, 0.03), (0.1, 0.3)
for _name, _title, _make, _errors in (
    ("wave", "wave field (32 x 32 x 32)", partial(wave_field, 32), _FIELD),
    ("heat", "heat field (32 x 32 x 32)", partial(heat_field, 32), _FIELD),
    ("wave-large", "wave field (64 x 128 x 128)", partial(wave_field, 128, 64), _FIELD),
    ("heat-large", "heat field (64 x 128 x 128)", partial(heat_field, 128, 64), _FIELD),
    ("vortices", "decaying vortices (64 x 64 x 64)", vortices, _FIELD),
    ("turbulence", "random field of spectrum k^-11/3 (64 x 64 x 64)", turbulence, _FIELD),
    ("burgers", "shocks of Burgers' equation (256 x 512)", burgers, _FIELD),
    ("spots", "reaction and diffusion (32 x 96 x 96)", spots, _FIELD),
    ("elevation", "elevation, Jacksboro fault (344 x 403)", elevation, _FIELD),
    ("brain", "brain, MNI152 T1 at 2 mm (99 x 117 x 95)", brain, _PICTURE),
    ("photo", "photograph, flower.jpg (427 x 640 x 3)", photo, _PICTURE),
):
    TENSORS.add(BenchTensor(_name, _title, _make, _errors, quick=_name in ("wave", "heat")))
