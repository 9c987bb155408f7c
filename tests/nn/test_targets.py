import pytest
import torch
from torch import nn

from tensornet_compress.errors import TargetError
from tensornet_compress.nn import find_targets, layer_weight, module_kind
from tests.models import tiny_bert, tiny_convnet, tiny_gpt2, tiny_llama


def names(found):
    return [item.name for item in found]


def test_by_default_all_linear_layers_but_the_head():
    chosen, skipped = find_targets(tiny_llama(tied=False))
    assert len(chosen) == 2 * 7
    assert all(target.kind == "linear" for target in chosen)
    reasons = {skip.name: skip.reason for skip in skipped}
    assert set(reasons) == {"model.embed_tokens", "lm_head"}
    assert "embeddings" in reasons["model.embed_tokens"]
    assert "head" in reasons["lm_head"]


def test_every_compressible_layer_is_chosen_or_skipped_with_a_reason():
    for model in (tiny_llama(), tiny_gpt2(), tiny_bert(), tiny_convnet()):
        chosen, skipped = find_targets(model)
        layers = {name for name, module in model.named_modules() if module_kind(module)}
        assert set(names(chosen)) | set(names(skipped)) | {t for target in chosen for t in target.tied} == layers
        assert not set(names(chosen)) & set(names(skipped))
        assert all(skip.reason for skip in skipped)


def test_kinds():
    assert {t.kind for t in find_targets(tiny_gpt2())[0]} == {"conv1d"}
    assert [t.kind for t in find_targets(tiny_convnet())[0]] == ["conv2d", "conv2d", "conv2d", "linear"]
    assert module_kind(nn.LayerNorm(3)) is None

    class Odd(nn.Linear):
        pass

    assert module_kind(Odd(2, 2)) is None


@pytest.mark.parametrize(
    ("targets", "ignore", "count"),
    [
        (["*.q_proj"], [], 2),
        (["q_proj"], [], 2),
        (["self_attn.*"], [], 8),
        (["model.layers.0.*"], [], 7),
        (["re:layers\\.1\\..*(gate|up)_proj$"], [], 2),
        (["*_proj"], ["mlp.*", "layers.0.*"], 4),
        (None, ["o_proj"], 12),
    ],
)
def test_patterns(targets, ignore, count):
    chosen, skipped = find_targets(tiny_llama(), targets, ignore)
    assert len(chosen) == count
    assert len(chosen) + len(skipped) == 16
    assert any("ignore" in skip.reason for skip in skipped) == bool(ignore)


@pytest.mark.parametrize("field", ["targets", "ignore"])
def test_a_pattern_without_a_match_is_an_error_with_the_nearest_names(field):
    with pytest.raises(TargetError, match=r"'q_porj' matches no.*q_proj"):
        find_targets(tiny_llama(), **{field: ["q_porj"]})
    with pytest.raises(TargetError, match="matches no"):
        find_targets(tiny_llama(), **{field: ["norm"]})


@pytest.mark.parametrize("field", ["targets", "ignore"])
def test_a_broken_regular_expression_is_quoted(field):
    with pytest.raises(TargetError, match=r"re:\(q_proj"):
        find_targets(tiny_llama(), **{field: ["re:(q_proj"]})


def test_tied_weights_are_one_target():
    chosen, _ = find_targets(tiny_llama(tied=True), ["embed_tokens", "lm_head"])
    assert [(t.name, t.tied) for t in chosen] == [("model.embed_tokens", ("lm_head",))]
    chosen, _ = find_targets(tiny_llama(tied=False), ["embed_tokens", "lm_head"])
    assert [(t.name, t.tied) for t in chosen] == [("model.embed_tokens", ()), ("lm_head", ())]


def test_half_of_a_tied_pair_is_refused_or_charged_with_its_other_half():
    chosen, skipped = find_targets(tiny_llama(tied=True), ["*_proj", "lm_head"])
    assert "lm_head" not in names(chosen)
    assert "embed_tokens" in {s.name: s.reason for s in skipped}["lm_head"]
    chosen, _ = find_targets(tiny_llama(tied=True), ["embed_tokens"])
    assert chosen[0].tied == ("lm_head",)


def test_nothing_left_is_an_error():
    with pytest.raises(TargetError, match="nothing to compress"):
        find_targets(tiny_llama(), ["q_proj"], ["q_proj"])
    with pytest.raises(TargetError, match="nothing to compress"):
        find_targets(nn.Sequential(nn.ReLU()))


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (nn.Linear(3, 4, device="meta"), "meta"),
        (nn.Linear(0, 4), "empty"),
        (nn.Embedding(4, 3, max_norm=1.0), "max_norm"),
        (nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect"), "reflect"),
    ],
)
def test_layers_that_cannot_be_networks_are_skipped_with_the_reason(module, reason):
    model = nn.ModuleDict({"odd": module, "good": nn.Linear(3, 4)})
    chosen, skipped = find_targets(model, ["odd", "good"])
    assert names(chosen) == ["good"]
    assert reason in skipped[0].reason


def test_a_weight_with_nan_names_its_module():
    model = nn.Sequential(nn.Linear(3, 4))
    with torch.no_grad():
        model[0].weight[0, 0] = float("nan")
    with pytest.raises(TargetError, match=r"'0' holds NaN"):
        find_targets(model)


def test_weights_are_seen_outputs_first():
    gpt2 = tiny_gpt2()
    block = gpt2.transformer.h[0]
    assert layer_weight(block.mlp.c_fc).shape == (128, 32)
    assert torch.equal(layer_weight(block.mlp.c_fc), block.mlp.c_fc.weight.T)
