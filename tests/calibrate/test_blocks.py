"""Running blocks one by one gives what the whole model gives, and leaves it as found."""

import pytest
import torch
from torch import nn

from tensornet_compress.calibrate import BlockRunner
from tensornet_compress.errors import TargetError, TensorNetError
from tensornet_compress.nn import find_targets
from tests.models import batches, tiny_bert, tiny_convnet, tiny_gpt2, tiny_llama


def names_of(model):
    return [target.name for target in find_targets(model)[0]]


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2, tiny_bert])
def test_blocks_in_turn_are_the_model(make):
    model, ids = make(), batches(2, rows=2, length=10)
    mask = torch.ones(2, 10, dtype=torch.long)
    mask[0, 7:] = 0
    data = [{"input_ids": batch, "attention_mask": mask} for batch in ids]
    seen = []
    last = BlockRunner(model, data, names_of(model)).blocks[-1][1]
    handle = last.register_forward_hook(lambda _m, _i, output: seen.append(output[0] if isinstance(output, tuple) else output))
    with torch.no_grad():
        for batch in data:
            model(**batch)
    handle.remove()
    runner = BlockRunner(model, data, names_of(model))
    for number, (state, want) in enumerate(zip(runner.states, seen)):
        with torch.no_grad():
            for block in range(len(runner.blocks)):
                state = runner.run(block, number, state)
        torch.testing.assert_close(runner.kept(number, state), runner.kept(number, want))
        assert len(runner.kept(number, state)) == int(mask.sum())


def test_modules_are_grouped_by_their_input_in_order_of_execution():
    model = tiny_llama()
    runner = BlockRunner(model, batches(1), names_of(model))
    inside = [f"self_attn.{x}_proj" for x in "vkqo"] + [f"mlp.{x}_proj" for x in ("up", "gate", "down")]
    groups = [set(group) for group in runner.groups(0, inside)]
    assert groups == [
        {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"},
        {"self_attn.o_proj"},
        {"mlp.gate_proj", "mlp.up_proj"},
        {"mlp.down_proj"},
    ]


def test_a_run_can_end_early():
    model = tiny_llama()
    runner = BlockRunner(model, batches(1), names_of(model))
    called, given = [], []
    runner.blocks[0][1].mlp.register_forward_hook(lambda *_: called.append(1))
    runner.run_until(0, 0, runner.states[0], {"self_attn.o_proj": given.append}, "self_attn.o_proj")
    assert len(given) == 1
    assert not called
    assert not runner.blocks[0][1].self_attn.o_proj._forward_pre_hooks


def test_the_model_is_left_as_found():
    model = tiny_llama().train()
    BlockRunner(model, batches(1), names_of(model))
    assert model.training
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_models_without_blocks_are_refused():
    with pytest.raises(TargetError, match="list of blocks"):
        BlockRunner(tiny_convnet(), batches(1), ["head"])
    with pytest.raises(TensorNetError, match="no batches"):
        BlockRunner(tiny_llama(), [], ["model.layers.0.mlp.up_proj"])


def test_a_module_that_is_never_called_is_named():
    model = tiny_llama()
    model.model.layers[0].spare = nn.Linear(2, 2)
    runner = BlockRunner(model, batches(1), names_of(tiny_llama()))
    with pytest.raises(TargetError, match="spare"):
        runner.groups(0, ["spare"])
