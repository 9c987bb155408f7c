"""Uses of caches that once went wrong, silently or with an error of somebody else."""

import pytest
import torch
from transformers import (
    DynamicCache,
    FalconH1Config,
    FalconH1ForCausalLM,
    MllamaConfig,
    MllamaForConditionalGeneration,
    OpenAIGPTConfig,
    OpenAIGPTLMHeadModel,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)

import tensornet_compress.kv as kv
from tensornet_compress.errors import TensorNetError
from tests.kv.tiny_models import VOCABULARY, tiny


def ids(length, seed=0):
    return torch.randint(1, VOCABULARY, (1, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("mode", ["live", "storage"])
@pytest.mark.parametrize("padding", [0, 5])
def test_positions_that_start_anew_are_other_texts_not_padding(mode, padding):
    model, text = tiny("llama-gqa"), ids(300)
    positions = torch.cat([torch.ones(padding, dtype=torch.int64), torch.arange(150), torch.arange(150 - padding)])[None]
    mask = (torch.arange(300) >= padding).long()[None]
    cache, exact = kv.CompressedCache(model, bits=8.0, mode=mode), DynamicCache(config=model.config)
    with torch.no_grad():
        found, wanted = (
            [model(text, attention_mask=mask, position_ids=positions, past_key_values=one).logits[:, padding:]]
            + [
                model(
                    ids(1, n), attention_mask=torch.cat([mask, torch.ones(1, n)], 1), position_ids=positions[:, -1:] + n,
                    past_key_values=one,
                ).logits
                for n in (1, 2)
            ]
            for one in (cache, exact)
        )  # fmt: skip
    assert cache.report().sealed_tokens > 100
    for one, other in zip(found, wanted):
        assert float((one - other).norm() / other.norm()) < 0.05


def test_a_model_that_leaves_its_cache_is_told_of():
    half = 8
    scaling = {"rope_type": "longrope", "short_factor": [1.0] * half, "long_factor": [2.0] * half, "rope_theta": 1e4}
    config = Phi3Config(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=512, original_max_position_embeddings=64, rope_scaling=scaling, pad_token_id=0,
    )  # fmt: skip
    model = Phi3ForCausalLM(config).eval()
    options = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None}
    with (
        kv.compressed(model, bits=2.0),
        pytest.warns(UserWarning, match=r"left the cache that it was given at \d+ of 203 tokens"),
    ):
        model.generate(ids(200), **options)


def test_requests_for_another_cache_are_refused():
    with kv.compressed(tiny("llama-gqa"), bits=4.0), pytest.raises(TensorNetError, match="cache of another kind"):
        tiny("llama-gqa").generate(ids(20), cache_implementation="static", max_new_tokens=2)


def test_models_without_a_cache_of_the_usual_kind_are_refused():
    sizes = {"vocab_size": VOCABULARY, "n_embd": 16, "n_layer": 2, "n_head": 2}
    model = OpenAIGPTLMHeadModel(OpenAIGPTConfig(**sizes))
    with kv.compressed(model, bits=4.0), pytest.raises(TensorNetError, match="takes no past_key_values"):
        model.generate(ids(20), max_new_tokens=2)
    small = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
    mixed = FalconH1ForCausalLM(
        FalconH1Config(**small, num_attention_heads=2, num_key_value_heads=2, mamba_d_ssm=32, mamba_n_heads=2, mamba_d_head=16)
    )
    with pytest.raises(TensorNetError, match="keep other states beside keys and values"):
        kv.CompressedCache(mixed, bits=4.0)


@pytest.mark.parametrize("mode", ["live", "storage"])
@pytest.mark.parametrize("crossing", [0, 1])
@pytest.mark.parametrize("image", [False, True])
def test_layers_that_look_at_an_image_stay_exact(image, crossing, mode):
    rotary = {"rope_type": "default", "rope_theta": 10000.0}
    text = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    text |= {"num_key_value_heads": 2, "cross_attention_layers": [crossing], "rope_parameters": rotary, "pad_token_id": 0}
    vision = {"hidden_size": 16, "num_hidden_layers": 2, "num_global_layers": 1, "attention_heads": 2, "intermediate_size": 32}
    vision |= {"vision_output_dim": 32, "image_size": 32, "patch_size": 8, "max_num_tiles": 2}
    vision |= {"intermediate_layers_indices": [0], "supported_aspect_ratios": [[1, 1], [1, 2]]}
    torch.manual_seed(0)
    model = MllamaForConditionalGeneration(MllamaConfig(text_config=text, vision_config=vision, image_token_index=95)).eval()
    given = {"input_ids": torch.randint(1, 95, (1, 260))}
    if image:
        given |= {"pixel_values": torch.randn(1, 1, 2, 3, 32, 32), "aspect_ratio_ids": torch.tensor([[1]])}
        given |= {"aspect_ratio_mask": torch.tensor([[[1, 0]]]), "cross_attention_mask": torch.ones(1, 260, 1, 2).long()}
    options = {"max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    wanted = model.generate(**given, **options).logits
    with kv.compressed(model, bits=8.0, mode=mode) as caches:
        found = model.generate(**given, **options).logits
    assert caches[0].report().sealed_tokens > 100
    for one, other in zip(found, wanted):
        assert float((one - other).norm() / other.norm()) < 0.05


@pytest.mark.parametrize("mode", ["live", "storage"])
@pytest.mark.parametrize("image", [False, True])
def test_positions_of_three_axes(image, mode):
    rotary = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
    text = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    text |= {"num_key_value_heads": 2, "rope_parameters": rotary}
    vision = {"depth": 2, "embed_dim": 32, "num_heads": 4, "hidden_size": 64, "mlp_ratio": 2, "patch_size": 8}
    marks = {"image_token_id": 90, "video_token_id": 91, "vision_start_token_id": 88, "vision_end_token_id": 89}
    torch.manual_seed(0)
    config = Qwen2VLConfig(text_config=text, vision_config=vision | {"spatial_merge_size": 2}, **marks)
    model = Qwen2VLForConditionalGeneration(config).eval()
    tokens = torch.randint(1, 80, (1, 260))
    given = {"input_ids": tokens}
    if image:
        tokens[:, 3:9] = torch.tensor([88, 90, 90, 90, 90, 89])
        given |= {"pixel_values": torch.randn(16, 384), "image_grid_thw": torch.tensor([[1, 4, 4]])}
        given |= {"mm_token_type_ids": (tokens == 90).long()}
    options = {"max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    wanted = model.generate(**given, **options).logits
    batches = [{"input_ids": torch.randint(1, 80, (1, 160))} for _ in range(5)]
    for profile in (None, kv.calibrate(model, batches, metric="euclidean", group_size=2)):
        with kv.compressed(model, bits=8.0, mode=mode, profile=profile) as caches:
            found = model.generate(**given, **options).logits
        assert caches[0].report().sealed_tokens > 100
        for one, other in zip(found, wanted):
            assert float((one - other).norm() / other.norm()) < 0.05
