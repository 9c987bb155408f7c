"""Tiny random models of the families a cache meets, and profiles for them."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import tensornet_compress.kv as kv

VOCABULARY = 97
_SHAPE = {"vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "max_position_embeddings": 512}
_IDS = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": None}


def _llama(heads: int, **extra: Any) -> Any:
    config = LlamaConfig(**_SHAPE, **_IDS, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=heads, **extra)
    return LlamaForCausalLM(config)


def _gemma() -> Any:
    config = Gemma3TextConfig(
        **_SHAPE, **_IDS, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=16, sliding_window=24,
        layer_types=["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
    )  # fmt: skip
    return Gemma3ForCausalLM(config)


def _qwen() -> Any:
    config = Qwen3Config(**_SHAPE, **_IDS, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=16)
    return Qwen3ForCausalLM(config)


def _gpt2() -> Any:
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_embd=64, n_layer=3, n_head=4, n_positions=512, **_IDS))


def _neox() -> Any:
    config = GPTNeoXConfig(**_SHAPE, **_IDS, num_hidden_layers=3, num_attention_heads=4, rotary_pct=0.25)
    return GPTNeoXForCausalLM(config)


def _cohere() -> Any:
    config = CohereConfig(**_SHAPE, **_IDS, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2)
    return CohereForCausalLM(config)


_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 10000.0}
FAMILIES: dict[str, Callable[[], Any]] = {
    "llama-gqa": lambda: _llama(2),
    "llama-mqa": lambda: _llama(1),
    "llama-mha": lambda: _llama(4),
    "llama-yarn": lambda: _llama(2, rope_parameters=_YARN),
    "qwen3": _qwen,
    "gemma3-hybrid": _gemma,
    "gpt2": _gpt2,
    "neox-partial": _neox,
    "cohere-interleaved": _cohere,
}


@cache
def tiny(name: str) -> Any:
    """A tiny random model; the same object for the whole run, so tests must leave it as found."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return FAMILIES[name]().eval()


@cache
def tiny_profile(name: str) -> kv.Profile:
    """A profile of a tiny model on random ids."""
    generator = torch.Generator().manual_seed(1)
    batches = [torch.randint(1, VOCABULARY, (2, 128), generator=generator) for _ in range(5)]
    return kv.calibrate(tiny(name), batches, group_size=2, joined=8, sensitivity_windows=2)


def generate(model: Any, ids: torch.Tensor, past: Any, new: int = 60, **options: Any) -> torch.Tensor:
    """Ids of a seeded generation with a given cache."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        options.setdefault("do_sample", False)
        return model.generate(ids, past_key_values=past, max_new_tokens=new, pad_token_id=0, **options)
