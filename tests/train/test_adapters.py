"""LoRA adapters of PEFT: what is stored stays while they train, and merging keeps what they learned."""

import pytest
import torch
from peft import LoraConfig

import tensornet_compress as tnc
from tensornet_compress.errors import TargetError, TensorNetError
from tensornet_compress.nn import NetworkModule, TNLinear
from tensornet_compress.train import lora, merge_lora, next_token_loss
from tests.models import batches, tiny_gpt2, tiny_llama

TASK = batches(4, seed=3)


def compressed(make=tiny_llama, **options):
    model = make()
    tnc.compress(model, tnc.Budget(bits_per_weight=4.5), batches(4), method="coded", workers=1, **options)
    return model


def trained(adapted, steps=25):
    optimiser = torch.optim.Adam([part for part in adapted.parameters() if part.requires_grad], 1e-2)
    for step in range(steps):
        optimiser.zero_grad()
        next_token_loss(adapted, TASK[step % len(TASK)]).backward()
        optimiser.step()
    return adapted


@torch.no_grad()
def task_loss(model):
    return sum(float(next_token_loss(model, ids)) for ids in TASK) / len(TASK)


def stored(model):
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, NetworkModule):
            name = name.removeprefix("base_model.model.").removesuffix(".base_layer")
            found |= {f"{name}.{key}": value.clone() for key, value in module.stored().items()}
    return found


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_an_adapter_learns_beside_networks_and_is_merged_into_them(make, tmp_path):
    model = compressed(make)
    before, start = stored(model), task_loss(model)
    assert any(isinstance(module, TNLinear) for module in model.modules())
    adapted = trained(lora(model, LoraConfig(r=4, target_modules="all-linear")))
    learned = task_loss(adapted)
    assert learned < 0.7 * start
    after = stored(adapted)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)

    adapted.save_pretrained(tmp_path / "adapter")
    again = lora(compressed(make), tmp_path / "adapter")
    assert task_loss(again) == pytest.approx(learned, rel=1e-5)

    merged = merge_lora(adapted, TASK, workers=1)
    assert task_loss(merged) < start - 0.9 * (start - learned)
    changed = {name.rpartition(".")[0] for name, part in stored(merged).items() if not torch.equal(part, before[name])}
    tied = {"model.embed_tokens", "lm_head", "transformer.wte", "transformer.wpe"}
    assert changed == {name.rpartition(".")[0] for name in before} - tied
    size = sum(map(torch.numel, before.values()))
    assert sum(map(torch.numel, stored(merged).values())) < 1.1 * size
    loaded = tnc.load(tnc.save(merged, tmp_path / "merged"))
    assert task_loss(loaded) == pytest.approx(task_loss(merged), rel=1e-6)


def test_an_adapter_taken_off_leaves_the_model_as_it_was_and_dense_layers_merge_too():
    model = tiny_llama(tied=False)
    options = {"allocator": "energy", "targets": ["q_proj"], "method": "dense", "workers": 1}
    tnc.compress(model, tnc.Budget(bits_per_weight=8.5), **options)
    before = model(TASK[0]).logits
    adapted = trained(lora(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"])), steps=3)
    assert not torch.allclose(adapted(TASK[0]).logits, before)
    assert torch.equal(adapted.unload()(TASK[0]).logits, before)
    adapted = trained(lora(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"])), steps=5)
    learned = task_loss(adapted)
    assert task_loss(merge_lora(adapted, workers=1)) == pytest.approx(learned, rel=1e-2)


def test_what_cannot_be_adapted_is_refused():
    with pytest.raises(TensorNetError, match="was not compressed"):
        lora(tiny_llama(), LoraConfig())
    model = compressed()
    with pytest.raises(TensorNetError, match="use_dora"):
        lora(model, LoraConfig(use_dora=True))
    with pytest.raises(TensorNetError, match="'pissa'"):
        lora(model, LoraConfig(init_lora_weights="pissa"))
    with pytest.raises(TargetError, match="lm_head"):
        lora(model, LoraConfig(target_modules=["lm_head"]))
    adapted = lora(model, LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(TensorNetError, match="merge_lora"):
        adapted.merge_and_unload()
    with pytest.raises(TensorNetError, match="give merge_lora batches"):
        merge_lora(adapted)
    with pytest.raises(TensorNetError, match="computed from its cores"):
        adapted.unload().model.layers[0].self_attn.q_proj.weight = torch.zeros(32, 32)
