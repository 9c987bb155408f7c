import pytest
import torch
from accelerate import cpu_offload
from torch import nn

import tensornet_compress as tnc
from tensornet_compress.compressing import model_nbytes
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


class Plain(nn.Linear):
    """Computes what its base does."""


class Written(nn.Linear):
    """Computes what its base does, in words of its own, as Falcon's layers do."""

    def forward(self, given):
        product = given @ self.weight.T
        return product if self.bias is None else product + self.bias


class Doubled(nn.Linear):
    def forward(self, given):
        return 2 * super().forward(given)


class Scaled(nn.Embedding):
    """As Gemma's embeddings."""

    def forward(self, ids):
        return 3.0 * super().forward(ids)


class Shifted(nn.Embedding):
    """What no network stands for."""

    def forward(self, ids):
        return 3.0 + super().forward(ids)


class Same(nn.Conv2d):
    """Pads as TensorFlow does."""

    def forward(self, x):
        return super().forward(nn.functional.pad(x, (0, 1, 0, 1)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_subclasses_are_of_the_kind_of_their_base_when_they_compute_the_same(dtype):
    kinds = {Plain: "linear", Written: "linear", Doubled: None}
    for make, kind in kinds.items():
        assert module_kind(make(200, 30).to(dtype)) == kind
        assert module_kind(make(200, 30, bias=False).to(dtype)) == kind
        assert module_kind(make(200, 30, device="meta")) == kind
    assert module_kind(Scaled(4, 3)) == module_kind(Scaled(4, 3).to(dtype)) == "embedding"
    assert module_kind(Scaled(4, 3, device="meta")) == "embedding"
    assert module_kind(Shifted(4, 3)) is None
    assert module_kind(Same(2, 2, 2)) is None
    before = torch.get_rng_state()
    model = nn.Sequential(Written(6, 5), Doubled(5, 4))
    chosen, skipped = find_targets(model)
    assert names(chosen) == ["0"]
    assert [(skip.name, skip.kind) for skip in skipped] == [("1", "Doubled")]
    assert "computes something else than nn.Linear" in skipped[0].reason
    calls = []
    model[0].register_forward_hook(lambda *_: calls.append(1))
    assert module_kind(model[0]) == "linear"
    assert not calls
    torch.set_rng_state(before)


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
        (nn.Linear(3, 4).to(torch.float8_e4m3fn), "float8_e4m3fn"),
        (nn.Linear(3, 4).to(torch.complex64), "complex64"),
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


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_up_proj, self.down_proj = nn.Parameter(torch.ones(3, 4, 5)), nn.Parameter(torch.ones(3, 5, 4))
        self.bias = nn.Parameter(torch.ones(5))


def test_every_matrix_left_alone_is_named_with_its_owner_its_bytes_and_the_reason():
    model = nn.ModuleDict(
        {
            "attention": nn.MultiheadAttention(4, 2),
            "signal": Same(2, 3, 3),
            "memory": nn.LSTM(3, 2),
            "pairs": nn.Bilinear(2, 3, 4),
            "experts": Experts(),
            "norm": nn.LayerNorm(4),
            "good": nn.Linear(3, 4),
            "list": nn.ParameterList([torch.ones(2, 2)]),
        }
    )
    chosen, skipped = find_targets(model)
    assert names(chosen) == ["good"]
    reasons = {skip.name: skip.reason for skip in skipped}
    assert set(reasons) == {"attention", "attention.out_proj", "signal", "memory", "pairs", "experts", "list"}
    assert "gate_up_proj, down_proj (480 bytes)" in reasons["experts"]
    assert "weight_ih_l0, weight_hh_l0" in reasons["memory"]
    assert "without calling it" in reasons["attention.out_proj"]
    assert {skip.name: skip.kind for skip in skipped}["memory"] == "LSTM"
    with pytest.raises(TargetError, match=r"'memory' matches no compressible module; 'memory' is left alone: .*a LSTM can be"):
        find_targets(model, ["memory"])
    assert names(find_targets(model, ignore=["memory"])[0]) == ["good"]


def test_the_matrices_of_a_model_itself_are_named():
    model = nn.Sequential(nn.Linear(3, 4))
    model.register_parameter("table", nn.Parameter(torch.ones(2, 2)))
    assert find_targets(model)[1][0].reason.startswith("table (16 bytes)")


@pytest.mark.parametrize("wrap", [nn.utils.weight_norm, nn.utils.parametrizations.weight_norm, nn.utils.spectral_norm])
def test_weights_that_are_computed_are_skipped_with_advice(wrap):
    model = nn.ModuleDict({"odd": wrap(nn.Linear(3, 4)), "second": wrap(nn.Linear(3, 4)), "good": nn.Linear(3, 4)})
    chosen, skipped = find_targets(model)
    assert [(target.name, target.tied) for target in chosen] == [("good", ())]
    assert [skip.name for skip in skipped] == ["odd", "second"]
    assert all("remove_parametrizations" in skip.reason for skip in skipped)


class Autoencoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.enc, self.dec, self.other = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.dec.weight = nn.Parameter(self.enc.weight.data.t())

    def forward(self, x):
        return self.other(self.dec(self.enc(x)))


@pytest.mark.parametrize("targets", [None, ["other"], ["enc"]])
def test_a_weight_and_its_transpose_are_two_targets(targets, tmp_path):
    torch.manual_seed(0)
    model, x = Autoencoder(), torch.randn(5, 8)
    wanted = model(x)
    report = tnc.compress(model, tnc.Budget(bits_per_weight=20), targets=targets, allocator="energy", workers=1)
    assert len(report.layers) == len(targets or "edo")
    assert float((model(x) - wanted).norm() / wanted.norm()) < 0.02
    assert report.nbytes == model_nbytes(model)
    again = tnc.load(tnc.save(model, tmp_path / "saved"), model=Autoencoder())
    torch.testing.assert_close(again(x), model(x))
    assert all(torch.equal(part, model.state_dict()[name]) for name, part in again.state_dict().items())


class TiedToAStranger(nn.Module):
    """A head that shares its table with an embedding that no network stands for."""

    def __init__(self):
        super().__init__()
        self.embed, self.body, self.head = Shifted(20, 8), nn.Linear(8, 8), nn.Linear(8, 20, bias=False)
        self.head.weight = self.embed.weight


def test_a_weight_that_a_stranger_goes_on_holding_is_left_alone():
    model = TiedToAStranger()
    chosen, skipped = find_targets(model, ["body", "head"])
    assert names(chosen) == ["body"]
    reason = {skip.name: skip.reason for skip in skipped}["head"]
    assert "shares its weight with 'embed.weight' of a Shifted" in reason
    report = tnc.compress(model, tnc.Budget(ratio=0.9), targets=["body", "head"], allocator="energy", workers=1)
    assert report.nbytes == model_nbytes(model) <= 0.9 * report.original_nbytes


def test_slices_of_one_memory_are_seen_to_overlap():
    whole = torch.randn(8, 4)
    model = nn.ModuleDict({"part": nn.Linear(4, 4, bias=False), "free": nn.Linear(4, 4, bias=False), "holder": Experts()})
    model["part"].weight = nn.Parameter(whole[2:6])
    model["holder"].gate_up_proj = nn.Parameter(whole[:3])
    chosen, skipped = find_targets(model)
    assert names(chosen) == ["free"]
    assert "'holder.gate_up_proj'" in skipped[0].reason
    model["holder"].gate_up_proj = nn.Parameter(whole[6:])
    assert names(find_targets(model)[0]) == ["part", "free"]


def test_weights_are_seen_outputs_first():
    gpt2 = tiny_gpt2()
    block = gpt2.transformer.h[0]
    assert layer_weight(block.mlp.c_fc).shape == (128, 32)
    assert torch.equal(layer_weight(block.mlp.c_fc), block.mlp.c_fc.weight.T)


def test_weights_offloaded_by_accelerate_are_left_alone_with_the_way_out():
    model = cpu_offload(nn.Sequential(nn.Linear(32, 32)), execution_device=torch.device("cpu"))
    with pytest.raises(TargetError, match=r"is not in memory .* compress its folder with tnc\.compress_folder"):
        tnc.compress(model, tnc.Budget(bits_per_weight=8.5), allocator="energy")
