"""A registry of tiny transformers models of every family that people use."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
import transformers
from torch import Tensor

VOCABULARY = 97
_TEXT = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
_SIZES = _TEXT | {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 512}
_PLAIN = _SIZES | {"intermediate_size": 48}
_GROUPED = _PLAIN | {"num_key_value_heads": 2}
_NARROW = _GROUPED | {"head_dim": 8}
_ALTERNATING = {"sliding_window": 48, "layer_types": ["sliding_attention", "full_attention"]}
_GPT = _TEXT | {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512}
_ROUTED = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
_TWO_SIDED = _TEXT | {
    "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 512, "decoder_start_token_id": 1,
}  # fmt: skip
_T5 = _TEXT | {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
_BLOCKS = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
_IMAGE = _BLOCKS | {"image_size": 32, "patch_size": 8}
_STAGES = {"depths": [1, 1], "num_stages": 2, "hidden_sizes": [16, 32]}
_WAVES = _BLOCKS | {
    "vocab_size": 32, "conv_dim": (16, 16), "conv_kernel": (10, 3), "conv_stride": (5, 2), "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4, "mask_time_prob": 0.0,
}  # fmt: skip


@dataclass(frozen=True)
class Family:
    """One family: the classes of its configuration and model, the sizes of a tiny one, and what it reads."""

    group: str
    config: str
    model: str
    sizes: dict[str, Any] = field(default_factory=dict)
    reads: str = "text"
    sharpness: float = 6


def _causal(config: str, sizes: dict[str, Any], model: str = "", group: str = "causal") -> Family:
    return Family(group, f"{config}Config", model or f"{config}ForCausalLM", sizes)


def _encoder(config: str, sizes: dict[str, Any], model: str = "") -> Family:
    return Family("encoder", f"{config}Config", model or f"{config}Model", sizes)


FAMILIES: dict[str, Family] = {
    "Llama": _causal("Llama", _GROUPED),
    "Mistral": _causal("Mistral", _GROUPED | {"sliding_window": None}),
    "Mistral, sliding": _causal("Mistral", _GROUPED | {"sliding_window": 48}),
    "Qwen2": _causal("Qwen2", _GROUPED),
    "Qwen3": _causal("Qwen3", _NARROW),
    "Gemma": _causal("Gemma", _NARROW),
    "Gemma 2": _causal("Gemma2", _NARROW | {"sliding_window": 48}),
    "Gemma 3": _causal("Gemma3Text", _NARROW | _ALTERNATING, "Gemma3ForCausalLM"),
    "Phi": _causal("Phi", _PLAIN),
    "Phi-3": _causal("Phi3", _GROUPED),
    "GPT-2": _causal("GPT2", _GPT, "GPT2LMHeadModel"),
    "GPT-Neo": _causal(
        "GPTNeo",
        _SIZES | {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 48},
    ),
    "GPT-NeoX": _causal("GPTNeoX", _PLAIN),
    "GPT-J": _causal("GPTJ", _GPT | {"rotary_dim": 4}),
    "CodeGen": _causal("CodeGen", _GPT | {"rotary_dim": 4}),
    "GPT-BigCode": _causal("GPTBigCode", _GPT),
    "OPT": _causal("OPT", _SIZES | {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "BLOOM": _causal("Bloom", _TEXT | {"hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "Falcon": _causal("Falcon", _SIZES),
    "MPT": _causal("Mpt", _TEXT | {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 512, "use_cache": True}),
    "StableLM": _causal("StableLm", _GROUPED),
    "StarCoder2": _causal("Starcoder2", _GROUPED),
    "OLMo 2": _causal("Olmo2", _GROUPED),
    "Cohere": _causal("Cohere", _GROUPED),
    "Granite": _causal("Granite", _GROUPED),
    "SmolLM3": _causal("SmolLM3", _GROUPED),
    "BioGPT": _causal("BioGpt", _PLAIN),
    "Mixtral": _causal("Mixtral", _GROUPED | {"num_local_experts": 4, "num_experts_per_tok": 2}, group="mixture"),
    "Qwen3-MoE": _causal("Qwen3Moe", _NARROW | _ROUTED, group="mixture"),
    "OLMoE": _causal("Olmoe", _GROUPED | _ROUTED, group="mixture"),
    "GPT-OSS": _causal(
        "GptOss",
        _NARROW | {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 48},
        group="mixture",
    ),
    "DeepSeek-V3": _causal(
        "DeepseekV3",
        _GROUPED
        | _LATENT
        | {"num_key_value_heads": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}
        | {"moe_intermediate_size": 16, "first_k_dense_replace": 1},
        group="mixture",
    ),
    "Llama 4": Family(
        "mixture",
        "Llama4TextConfig",
        "Llama4ForCausalLM",
        _NARROW
        | {"intermediate_size_mlp": 48, "num_local_experts": 4, "num_experts_per_tok": 2}
        | {"layer_types": ["full_attention"] * 2, "no_rope_layers": [1, 0], "attn_temperature_tuning": False},
    ),
    "JetMoE": _causal(
        "JetMoe",
        _SIZES
        | {"num_key_value_heads": 2, "kv_channels": 8, "intermediate_size": 16, "num_local_experts": 4}
        | {"num_experts_per_tok": 2},
        group="mixture",
    ),
    "Mamba": _causal("Mamba", _SIZES | {"state_size": 4}, group="hybrid"),
    "Qwen3-Next": _causal(
        "Qwen3Next",
        _NARROW
        | _ROUTED
        | {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
        | {"shared_expert_intermediate_size": 16, "layer_types": ["linear_attention", "full_attention"]},
        group="hybrid",
    ),
    "Jamba": _causal(
        "Jamba",
        _GROUPED
        | {"num_experts": 2, "num_experts_per_tok": 1, "attn_layer_period": 2, "attn_layer_offset": 1}
        | {"expert_layer_period": 2, "expert_layer_offset": 1, "mamba_d_state": 4},
        group="hybrid",
    ),
    "RecurrentGemma": _causal(
        "RecurrentGemma",
        _GROUPED | {"attention_window_size": 48, "lru_width": 32, "num_hidden_layers": 3},
        group="hybrid",
    ),
    "LFM2": _causal("Lfm2", _GROUPED | {"layer_types": ["conv", "full_attention"]}, group="hybrid"),
    "BERT": _encoder("Bert", _PLAIN, "BertForMaskedLM"),
    "BERT, answers": _encoder("Bert", _PLAIN, "BertForQuestionAnswering"),
    "RoBERTa": _encoder("Roberta", _PLAIN),
    "DistilBERT": _encoder("DistilBert", _TEXT | {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48}),
    "ELECTRA": _encoder("Electra", _PLAIN | {"embedding_size": 16}),
    "ALBERT": _encoder("Albert", _PLAIN | {"embedding_size": 16}),
    "DeBERTa-v2": _encoder("DebertaV2", _PLAIN | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]}),
    "ModernBERT": _encoder("ModernBert", _PLAIN | {"cls_token_id": 1, "sep_token_id": 2}),
    "MPNet": _encoder("MPNet", _PLAIN),
    "T5": Family("encoder-decoder", "T5Config", "T5ForConditionalGeneration", _T5, "both", 2),
    "BART": Family("encoder-decoder", "BartConfig", "BartForConditionalGeneration", _TWO_SIDED, "both"),
    "Marian": Family("encoder-decoder", "MarianConfig", "MarianMTModel", _TWO_SIDED, "both"),
    "Pegasus": Family("encoder-decoder", "PegasusConfig", "PegasusForConditionalGeneration", _TWO_SIDED, "both"),
    "ViT": Family("vision", "ViTConfig", "ViTForImageClassification", _IMAGE, "image"),
    "DeiT": Family("vision", "DeiTConfig", "DeiTModel", _IMAGE, "image"),
    "BEiT": Family("vision", "BeitConfig", "BeitModel", _IMAGE, "image"),
    "DINOv2": Family("vision", "Dinov2Config", "Dinov2Model", _IMAGE, "image"),
    "Swin": Family(
        "vision",
        "SwinConfig",
        "SwinModel",
        {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4], "window_size": 4},
        "image",
    ),
    "SegFormer": Family(
        "vision",
        "SegformerConfig",
        "SegformerForSemanticSegmentation",
        {"num_encoder_blocks": 2, "depths": [1, 1], "sr_ratios": [2, 1], "hidden_sizes": [16, 32], "patch_sizes": [7, 3]}
        | {"strides": [4, 2], "num_attention_heads": [1, 2], "mlp_ratios": [2, 2]}
        | {"decoder_hidden_size": 16, "initializer_range": 0.2},
        "image",
    ),
    "ConvNeXt": Family("convolutional", "ConvNextConfig", "ConvNextModel", _STAGES | {"layer_scale_init_value": 1.0}, "image"),
    "ResNet": Family(
        "convolutional",
        "ResNetConfig",
        "ResNetForImageClassification",
        _STAGES | {"embedding_size": 16, "layer_type": "basic"},
        "image",
    ),
    "MobileNet-V2": Family(
        "convolutional",
        "MobileNetV2Config",
        "MobileNetV2ForImageClassification",
        {"depth_multiplier": 0.1, "initializer_range": 0.3, "finegrained_output": False},
        "image",
    ),
    "wav2vec 2.0": Family("audio", "Wav2Vec2Config", "Wav2Vec2ForCTC", _WAVES, "wave"),
    "HuBERT": Family("audio", "HubertConfig", "HubertModel", _WAVES, "wave"),
    "Whisper": Family(
        "audio",
        "WhisperConfig",
        "WhisperForConditionalGeneration",
        _TWO_SIDED
        | {"num_mel_bins": 16, "max_source_positions": 50, "max_target_positions": 512, "begin_suppress_tokens": None}
        | {"suppress_tokens": None},
        "mel",
    ),
    "AST": Family(
        "audio",
        "ASTConfig",
        "ASTForAudioClassification",
        _BLOCKS | {"max_length": 64, "num_mel_bins": 16, "patch_size": 8},
        "bands",
    ),
    "CLIP": Family(
        "vision-language",
        "CLIPConfig",
        "CLIPModel",
        {"text_config": _PLAIN | {"eos_token_id": 2}, "vision_config": _IMAGE, "projection_dim": 16},
        "image and text",
    ),
    "SigLIP": Family(
        "vision-language", "SiglipConfig", "SiglipModel", {"text_config": _PLAIN, "vision_config": _IMAGE}, "image and text"
    ),
    "LLaVA": Family(
        "vision-language",
        "LlavaConfig",
        "LlavaForConditionalGeneration",
        {"text_config": _GROUPED | {"model_type": "llama"}, "image_token_index": 96, "vision_feature_layer": -1}
        | {"vision_config": _IMAGE | {"model_type": "clip_vision_model"}},
        "image in text",
    ),
}


@cache
def sharp(name: str) -> Any:
    """A tiny random model of a family, in evaluation mode, whose attention weights are so large that errors show; the same
    object for the whole run, so that users copy it before they change it."""
    family = FAMILIES[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(transformers, family.model)(getattr(transformers, family.config)(**family.sizes)).eval()
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if parameter.ndim > 1 and "att" in key.lower() and "bias" not in key and "embed" not in key:
                    parameter.mul_(family.sharpness)
                if key.endswith("sinks"):
                    parameter.normal_(std=2.0)
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.pad_token_id, model.generation_config.eos_token_id = 0, None
    return model


def ids(rows: int, length: int, seed: int = 2) -> Tensor:
    """Token ids without padding."""
    return torch.randint(3, VOCABULARY - 1, (rows, length), generator=torch.Generator().manual_seed(seed))


def _noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3))


def _image_in_text() -> dict[str, Tensor]:
    text = ids(2, 30)
    text[:, 4:20] = 96
    return {"input_ids": text, "pixel_values": _noise(2, 3, 32, 32)}


_INPUTS: dict[str, Callable[[], dict[str, Tensor]]] = {
    "text": lambda: {"input_ids": ids(2, 24)},
    "both": lambda: {"input_ids": ids(2, 24), "decoder_input_ids": ids(2, 12, 4)},
    "image": lambda: {"pixel_values": _noise(2, 3, 32, 32)},
    "wave": lambda: {"input_values": _noise(2, 800)},
    "mel": lambda: {"input_features": _noise(2, 16, 100), "decoder_input_ids": ids(2, 12, 4)},
    "bands": lambda: {"input_values": _noise(2, 64, 16)},
    "image and text": lambda: {"input_ids": ids(2, 24), "pixel_values": _noise(2, 3, 32, 32)},
    "image in text": _image_in_text,
}


def inputs(name: str) -> dict[str, Tensor]:
    """What a model of a family is called with: a batch of two examples."""
    return _INPUTS[FAMILIES[name].reads]()
