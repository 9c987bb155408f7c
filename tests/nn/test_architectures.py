"""Every matrix of a model of any family is a target, tied to one, or named with a reason."""

import pytest
import torch

import tensornet_compress as tnc
from tensornet_compress.compressing import model_nbytes
from tensornet_compress.nn import find_targets

transformers = pytest.importorskip("transformers")

_SIZES = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
_GATED = _SIZES | {"intermediate_size": 48, "num_key_value_heads": 2}
_ROUTED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 16}
_LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
FAMILIES = {
    "Llama": _GATED,
    "Gemma3Text": _GATED | {"head_dim": 8, "tie_word_embeddings": True},
    "Mixtral": _GATED | {"num_local_experts": 4},
    "GptOss": _GATED | {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
    "DeepseekV3": _GATED | _ROUTED | _LATENT | {"num_key_value_heads": 4, "first_k_dense_replace": 1},
    "Falcon": _SIZES,
    "Bloom": {"vocab_size": 97, "hidden_size": 32, "n_layer": 2, "n_head": 4},
    "GPT2": {"vocab_size": 97, "n_embd": 32, "n_layer": 2, "n_head": 4},
    "Opt": _SIZES | {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "Mamba": {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
}
_CLASSES = {"GPT2": "GPT2LMHeadModel", "Opt": "OPTForCausalLM", "Gemma3Text": "Gemma3ForCausalLM"}


def build(family):
    torch.manual_seed(0)
    config = getattr(transformers, {"Opt": "OPT"}.get(family, family) + "Config")(**FAMILIES[family])
    return getattr(transformers, _CLASSES.get(family, f"{family}ForCausalLM"))(config).eval()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("targets", [None, ["*"]])
def test_no_matrix_is_left_alone_in_silence(family, targets):
    model = build(family)
    chosen, skipped = find_targets(model, targets)
    compressed = {name for target in chosen for name in (target.name, *target.tied)}
    reasons = {skip.name: skip.reason for skip in skipped}
    assert not compressed & set(reasons)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.ndim > 1:
            owner, _, part = name.rpartition(".")
            assert owner in compressed or owner in reasons, name
            assert part == "weight" or part in reasons[owner]


@pytest.mark.parametrize("family", ["Falcon", "Gemma3Text", "Mixtral", "GPT2", "Opt"])
def test_reported_bytes_are_held_and_saved_models_answer_alike(family, tmp_path):
    model, ids = build(family), torch.randint(97, (2, 12), generator=torch.Generator().manual_seed(1))
    report = tnc.compress(model, tnc.Budget(bits_per_weight=8.5), targets=["*"], allocator="energy", method="dense", workers=1)
    assert report.nbytes == model_nbytes(model)
    again = tnc.load(tnc.save(model, tmp_path / "saved"))
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)
