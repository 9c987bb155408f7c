"""Tiny random models of the families a cache meets, and profiles for them."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from transformers import (
    BloomConfig,
    BloomForCausalLM,
    CohereConfig,
    CohereForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
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


def _latent_attention() -> Any:
    config = DeepseekV3Config(
        **_SHAPE, **_IDS, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=4, kv_lora_rank=32, q_lora_rank=32,
        qk_rope_head_dim=8, qk_nope_head_dim=16, v_head_dim=16, n_routed_experts=4, n_group=2, topk_group=1,
        num_experts_per_tok=2, moe_intermediate_size=32,
    )  # fmt: skip
    return DeepseekV3ForCausalLM(config)


def _attention_sinks() -> Any:
    config = GptOssConfig(
        **_SHAPE, **_IDS, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=16, sliding_window=32,
        layer_types=["full_attention", "sliding_attention", "full_attention"], num_local_experts=4, num_experts_per_tok=2,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )  # fmt: skip
    model = GptOssForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith("sinks"):
            torch.nn.init.normal_(parameter, std=2.0)
    return model


def _soft_cap() -> Any:
    config = Gemma2Config(
        **_SHAPE, **_IDS, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=16, sliding_window=24,
        attn_logit_softcapping=5.0,
    )  # fmt: skip
    return Gemma2ForCausalLM(config)


def _linear_and_full() -> Any:
    config = Qwen3NextConfig(
        **_SHAPE, **_IDS, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=16, num_experts=4,
        layer_types=["linear_attention", "linear_attention", "full_attention"], num_experts_per_tok=2,
        linear_num_value_heads=4, linear_num_key_heads=2, linear_key_head_dim=16, linear_value_head_dim=16,
        moe_intermediate_size=32, shared_expert_intermediate_size=32,
    )  # fmt: skip
    return Qwen3NextForCausalLM(config)


def _encoder_decoder() -> Any:
    config = T5Config(
        vocab_size=VOCABULARY, d_model=64, d_kv=16, d_ff=96, num_layers=2, num_heads=4, decoder_start_token_id=0,
        pad_token_id=0, eos_token_id=None,
    )  # fmt: skip
    return T5ForConditionalGeneration(config)


ARCHITECTURES: dict[str, Callable[[], Any]] = {
    "latent attention": _latent_attention,
    "attention sinks": _attention_sinks,
    "soft cap": _soft_cap,
    "linear and full": _linear_and_full,
    "own attention": lambda: BloomForCausalLM(BloomConfig(vocab_size=VOCABULARY, hidden_size=64, n_layer=3, n_head=4, **_IDS)),
    "encoder-decoder": _encoder_decoder,
}
"""Models whose attention is not that of a plain decoder."""


@cache
def strong(name: str) -> Any:
    """A tiny model of ``ARCHITECTURES`` (or ``FAMILIES``) whose attention weights are so large that errors show."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = (ARCHITECTURES | FAMILIES)[name]().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "att" in name.lower() and "bias" not in name and "embed" not in name:
                parameter.mul_(6)
    return model


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
