"""Models that benchmarks run on: registered ones, and any local folder or hub id."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tensornet_compress.bench.registry import Registry
from tensornet_compress.errors import TensorNetError
from tensornet_compress.files import MANIFEST
from tensornet_compress.inputs import Kind, load_causal_lm, load_encoder, load_tokenizer, model_kind, resolve_model


@dataclass(frozen=True)
class BenchModel:
    """``load``: the model in fp32, ``tokenizer``: its tokenizer."""

    name: str
    kind: Kind
    load: Callable[[], Any]
    tokenizer: Callable[[], Any]


MODELS: Registry[BenchModel] = Registry("model")


def from_folder(name: str) -> BenchModel:
    """A transformers folder, hub id or bundled model; an encoder unless its configuration names a causal language model.

    Raises:
        TensorNetError: no such folder, one without a readable configuration or tokenizer, or one that is compressed already.
    """
    folder = resolve_model(name)
    if (Path(folder) / MANIFEST).is_file():
        raise TensorNetError(f"{name!r} is compressed already; give the original model")
    kind = model_kind(name)
    load = load_causal_lm if kind == "causal" else load_encoder
    return BenchModel(name, kind, partial(load, folder, torch.float32), partial(load_tokenizer, folder))


def find_model(name: str) -> BenchModel:
    """A registered model, or what ``from_folder`` makes of the name."""
    return MODELS[name] if name in MODELS else from_folder(name)


_BUNDLED: tuple[tuple[str, Kind, Callable[..., Any]], ...] = (
    ("smollm2-135m", "causal", load_causal_lm),
    ("all-minilm-l6-v2", "encoder", load_encoder),
)
for _name, _kind, _load in _BUNDLED:
    MODELS.add(BenchModel(_name, _kind, partial(_load, _name, torch.float32), partial(load_tokenizer, _name)))
