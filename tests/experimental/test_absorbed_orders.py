"""Free orders: the model computes what it did, and only models that are understood are touched."""

from __future__ import annotations

import copy

import pytest
import torch

from tensornet_compress.errors import TensorNetError
from tensornet_compress.experimental import FreeOrders, absorb_orders, free_orders, reordered
from tests.kv.tiny_models import VOCABULARY, tiny

KINDS = ("residual", "neurons", "values", "heads")


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(1, VOCABULARY, (2, 40), generator=torch.Generator().manual_seed(0))


def random_orders(model, *kinds: str) -> FreeOrders:
    generator = torch.Generator().manual_seed(1)
    config = model.config
    kv, group = config.num_key_value_heads, config.num_attention_heads // config.num_key_value_heads
    width = model.model.layers[0].self_attn.v_proj.weight.shape[0] // kv
    layers = range(len(model.model.layers))

    def permutations(count: int, size: int) -> torch.Tensor:
        return torch.stack([torch.randperm(size, generator=generator) for _ in range(count)])

    made = {
        "residual": torch.randperm(config.hidden_size, generator=generator),
        "neurons": {layer: permutations(1, config.intermediate_size)[0] for layer in layers},
        "values": {layer: permutations(kv, width) for layer in layers},
        "heads": {layer: permutations(kv, group) for layer in layers},
    }
    return FreeOrders(**{kind: made[kind] for kind in kinds})


@pytest.mark.parametrize("name", ["llama-gqa", "llama-mqa", "llama-mha", "llama-yarn"])
@pytest.mark.parametrize(
    "kinds", [("residual",), ("neurons",), ("values",), ("heads",), ("residual", "neurons", "values", "heads")]
)
def test_the_model_computes_what_it_did(name, kinds, ids):
    model = copy.deepcopy(tiny(name))
    with torch.no_grad():
        before = model(ids).logits
        absorb_orders(model, random_orders(model, *kinds))
        assert torch.allclose(model(ids).logits, before, atol=1e-5)


def test_chosen_orders_change_the_weights_and_not_the_outputs(ids):
    model = copy.deepcopy(tiny("llama-gqa"))
    weights = {name: parameter.data.clone() for name, parameter in model.named_parameters()}
    with torch.no_grad():
        before = model(ids).logits
        with reordered(model, free_orders(model)):
            assert torch.allclose(model(ids).logits, before, atol=1e-5)
            norms = model.model.layers[1].mlp.down_proj.weight.square().sum(0)
            assert torch.equal(norms, norms.sort()[0])
            assert not torch.equal(weights["model.embed_tokens.weight"], model.model.embed_tokens.weight)
    assert all(torch.equal(parameter, weights[name]) for name, parameter in model.named_parameters())


@pytest.mark.parametrize("name", ["gpt2", "neox-partial", "qwen3", "gemma3-hybrid", "cohere-interleaved"])
def test_models_of_another_build_are_refused_untouched(name):
    model = tiny(name)
    with pytest.raises(TensorNetError, match=r"not built like a Llama decoder|not known to follow"):
        free_orders(model)


def test_what_is_no_permutation_is_refused_before_anything_changes(ids):
    model = copy.deepcopy(tiny("llama-gqa"))
    before = model(ids).logits
    bad = FreeOrders(
        neurons={0: torch.arange(model.config.intermediate_size)}, residual=torch.zeros(model.config.hidden_size).long()
    )
    with pytest.raises(TensorNetError, match="order of residual"):
        absorb_orders(model, bad)
    with pytest.raises(TensorNetError, match="name layer 99"):
        absorb_orders(model, FreeOrders(neurons={99: torch.arange(3)}))
    assert torch.equal(model(ids).logits, before)


def test_weights_that_are_used_twice_or_not_by_linear_layers_are_refused(ids):
    shared_layer, shared_weight = (copy.deepcopy(tiny("llama-gqa")) for _ in range(2))
    shared_layer.model.layers[1] = shared_layer.model.layers[0]
    layers = shared_weight.model.layers
    layers[1].mlp.gate_proj.weight = layers[0].mlp.gate_proj.weight
    for model in (shared_layer, shared_weight):
        before = model(ids).logits
        with pytest.raises(TensorNetError, match=r"layers\.0.* and layers\.1.* are one weight"):
            absorb_orders(model, random_orders(tiny("llama-gqa"), "neurons"))
        assert torch.equal(model(ids).logits, before)
    paired = copy.deepcopy(tiny("llama-gqa"))
    paired.model.layers[0].self_attn.lambda_q1 = torch.nn.Parameter(torch.ones(4))
    with pytest.raises(TensorNetError, match=r"layer 0 has parts \['lambda_q1'\]"):
        free_orders(paired)
