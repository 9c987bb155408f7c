"""Modules that hide their layers are split into equal ones, compressed, saved and loaded; computed weights become plain."""

import copy

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

import tensornet_compress as tnc
from tensornet_compress.compressing import model_nbytes
from tensornet_compress.errors import BudgetError, TargetError
from tensornet_compress.nn.split_torch import SplitAttention, SplitBag, SplitBilinear, SplitRecurrent
from tensornet_compress.nn.splits import split_of
from tensornet_compress.nn.splitting import split_modules

X = torch.randn(2, 12, 32, generator=torch.Generator().manual_seed(0))
NORMS = {
    "hooks of weight_norm": nn.utils.weight_norm,
    "weight_norm": nn.utils.parametrizations.weight_norm,
    "hooks of spectral_norm": nn.utils.spectral_norm,
    "spectral_norm": nn.utils.parametrizations.spectral_norm,
    "orthogonal": nn.utils.parametrizations.orthogonal,
}


class Holder(nn.Module):
    """Calls a module that is not the model itself."""

    def __init__(self, make, call):
        super().__init__()
        torch.manual_seed(0)
        self.part, self.call = make(), call

    def forward(self, x):
        return self.call(self.part, x)


def normed(name, layer):
    """A layer whose state was loaded, so that the weight on show is stale."""
    made = NORMS[name](layer)
    generator = torch.Generator().manual_seed(1)
    state = made.state_dict()
    made.load_state_dict({key: value + torch.randn(value.shape, generator=generator) for key, value in state.items()})
    return made


def first(given):
    return given[0]


HOLDERS = {
    "attention": (lambda: nn.MultiheadAttention(32, 4, batch_first=True), lambda m, x: first(m(x, x, x))),
    "other widths": (lambda: nn.MultiheadAttention(32, 4, kdim=16, vdim=8, bias=False),
                     lambda m, x: first(m(x, x[..., :16], x[..., :8]))),
    "encoder": (lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 48, batch_first=True), 2), lambda m, x: m(x)),
    "lstm": (lambda: nn.LSTM(32, 24, 2, bidirectional=True, batch_first=True), lambda m, x: first(m(x))),
    "lstm, projected": (lambda: nn.LSTM(32, 24, proj_size=16), lambda m, x: first(m(x))),
    "gru": (lambda: nn.GRU(32, 24, batch_first=True), lambda m, x: first(m(x))),
    "rnn": (lambda: nn.RNN(32, 24, nonlinearity="relu", bias=False), lambda m, x: first(m(x))),
    "bilinear": (lambda: nn.Bilinear(32, 32, 16), lambda m, x: m(x, x.flip(1))),
    "bag": (lambda: nn.EmbeddingBag(40, 32, mode="mean", padding_idx=3), lambda m, x: m((x[..., 0].abs() * 10).long())),
    "conv1d": (lambda: nn.Conv1d(32, 16, 3, stride=2, padding="valid"), lambda m, x: m(x.mT)),
    "conv3d": (lambda: nn.Conv3d(8, 16, (3, 2, 1), padding=1), lambda m, x: m(x.reshape(2, 8, 4, 3, 4))),
    "grouped": (lambda: nn.Conv1d(32, 16, 3, groups=4), lambda m, x: m(x.mT)),
    "transposed 1-d": (lambda: nn.ConvTranspose1d(32, 16, 3, stride=2), lambda m, x: m(x.mT)),
    "transposed 2-d": (lambda: nn.ConvTranspose2d(32, 16, 3, 2, output_padding=1), lambda m, x: m(x.mT.reshape(2, 32, 3, 4))),
    "transposed 3-d": (lambda: nn.ConvTranspose3d(8, 16, 2), lambda m, x: m(x.reshape(2, 8, 4, 3, 4), output_size=(5, 4, 5))),
    **{name: (lambda name=name: normed(name, nn.Linear(32, 32)), lambda m, x: m(x)) for name in NORMS},
}  # fmt: skip


@pytest.mark.parametrize("method", ["dense", "coded"])
@pytest.mark.parametrize("name", HOLDERS)
@torch.no_grad()
def test_what_hides_its_layers_is_compressed_and_comes_back(name, method, tmp_path):
    make, call = HOLDERS[name]
    model, exact = Holder(make, call).eval(), Holder(make, call).eval()
    wanted = exact(X)
    with torch.enable_grad():
        report = tnc.compress(model, tnc.Budget(bits_per_weight=9), [X], method=method, targets=["*"], workers=1)
    found = model(X)
    assert (found - wanted).norm() < 0.05 * wanted.norm()
    assert report.nbytes == model_nbytes(model)
    assert all(layer.error > 0 for layer in report.layers)
    again = tnc.load(tnc.save(model, tmp_path / "saved"), model=Holder(make, call))
    assert torch.equal(again(X), found)
    assert torch.equal(copy.deepcopy(model)(X), found)
    assert torch.allclose(tnc.materialize(model)(X), found, atol=1e-5)


_PLAIN = {"conv1d", "conv3d", "grouped", "transposed"}


@pytest.mark.parametrize("name", [name for name in HOLDERS if name.split()[0] not in _PLAIN])
@torch.no_grad()
def test_a_split_module_is_equal_with_and_without_somebody_looking(name):
    make, call = HOLDERS[name]
    model = Holder(make, call).eval()
    wanted = model(X)
    assert split_modules(model, ["*"], (), True)
    assert torch.allclose(model(X), wanted, atol=1e-5)
    seen = []
    handles = [part.register_forward_hook(lambda *_: seen.append(1)) for part in model.modules() if type(part) is nn.Linear]
    assert torch.allclose(model(X), wanted, atol=1e-5)
    assert bool(seen) == bool(handles)


@torch.no_grad()
def test_attention_takes_masks_and_gives_what_it_paid():
    torch.manual_seed(0)
    for batch_first in (True, False):
        whole = nn.MultiheadAttention(32, 4, batch_first=batch_first).eval()
        split = SplitAttention(whole)
        x = X if batch_first else X.transpose(0, 1)
        causal, padding = torch.ones(12, 12).triu(1).bool(), torch.zeros(2, 12).bool()
        padding[1, 9:] = True
        for options in (
            {"attn_mask": causal}, {"key_padding_mask": padding}, {"attn_mask": causal, "key_padding_mask": padding},
            {"attn_mask": torch.randn(8, 12, 12)}, {"need_weights": False}, {"average_attn_weights": False},
        ):  # fmt: skip
            for one, other in zip(whole(x, x, x, **options), split(x, x, x, **options)):
                assert (one is None) == (other is None)
                assert one is None or torch.allclose(one, other, atol=1e-6)
    one, other = whole(X[0], X[0], X[0]), split(X[0], X[0], X[0])
    assert all(torch.allclose(*pair, atol=1e-6) for pair in zip(one, other))


@torch.no_grad()
def test_recurrent_modules_take_states_and_packed_sequences():
    torch.manual_seed(0)
    for whole in (nn.LSTM(32, 24, 2, bidirectional=True, batch_first=True), nn.GRU(32, 24)):
        split = SplitRecurrent(whole)
        x = X if whole.batch_first else X.transpose(0, 1)
        state = torch.randn(4 if whole.bidirectional else 1, 2, 24)
        state = (state, state.flip(0)) if whole.mode == "LSTM" else state
        packed = nn.utils.rnn.pack_padded_sequence(x, torch.tensor([12, 7]), batch_first=whole.batch_first)
        assert torch.equal(whole(packed)[0].data, split(packed)[0].data)
        for watched in (False, True):
            if watched:
                [part.register_forward_hook(lambda *_: None) for part in split.children()]
            for one, other in zip(*(tree_leaves(module(x, state)) for module in (whole, split)), strict=True):
                assert torch.allclose(one, other, atol=1e-6)
            assert torch.allclose(whole(x[0])[0], split(x[0])[0], atol=1e-6)


@torch.no_grad()
def test_bags_of_any_kind():
    ids, offsets = torch.tensor([1, 2, 4, 3, 3, 5]), torch.tensor([0, 0, 4, 6])
    for mode in ("sum", "mean"):
        whole = nn.EmbeddingBag(7, 5, mode=mode, include_last_offset=True, padding_idx=3)
        assert torch.allclose(whole(ids, offsets), SplitBag(whole)(ids, offsets), atol=1e-6)
    whole = nn.EmbeddingBag(7, 5, mode="sum")
    weights = torch.randn(2, 3)
    given = (ids.view(2, 3), None, weights)
    assert torch.allclose(whole(*given), SplitBag(whole)(*given), atol=1e-6)
    assert split_of(nn.EmbeddingBag(7, 5, mode="max")) is None
    assert split_of(nn.EmbeddingBag(7, 5, mode="sum", max_norm=1.0)) is None


def test_only_what_targets_want_is_split_and_a_failure_leaves_the_model_as_it_was():
    model = nn.ModuleDict({"memory": nn.LSTM(8, 8), "pairs": nn.Bilinear(4, 4, 4), "plain": nn.Linear(8, 8)})
    tnc.compress(model, tnc.Budget(bits_per_weight=9), targets=["plain"], allocator="energy", workers=1)
    assert (type(model["memory"]), type(model["pairs"])) == (nn.LSTM, nn.Bilinear)
    options = {"allocator": "energy", "workers": 1}
    with pytest.raises(BudgetError):
        tnc.compress(model, tnc.Budget(nbytes=10), targets=["memory", "pairs"], **options)
    assert (type(model["memory"]), type(model["pairs"])) == (nn.LSTM, nn.Bilinear)
    report = tnc.compress(model, tnc.Budget(bits_per_weight=12), targets=["memory", "pairs"], ignore=["hh_l0"], **options)
    assert [layer.name for layer in report.layers] == ["memory.ih_l0", "pairs.product"]
    assert (type(model["memory"]), type(model["pairs"])) == (SplitRecurrent, SplitBilinear)
    assert model["memory"].hidden_size == model["pairs"].in1_features * 2 == 8


def test_nothing_to_compress_names_every_reason():
    model = nn.ModuleDict({"table": nn.Embedding(4, 3), "bag": nn.EmbeddingBag(4, 3, mode="max")})
    with pytest.raises(TargetError, match=r"'table' first\): embeddings are.*'bag' first\): weight"):
        tnc.compress(model, tnc.Budget(bits_per_weight=9), allocator="energy")


class Borrowed(nn.Module):
    """Multiplies with a layer's weight without calling the layer."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.called, self.borrowed = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x):
        return nn.functional.linear(self.called(x), self.borrowed.weight, self.borrowed.bias)


@pytest.mark.parametrize("method", ["dense", "coded"])
def test_a_weight_that_is_used_without_its_layer_is_noted(method):
    model, wanted = Borrowed(), Borrowed()(X)
    report = tnc.compress(model, tnc.Budget(bits_per_weight=9), [X], method=method, workers=1)
    assert (model(X) - wanted).norm() < 0.02 * wanted.norm()
    assert "calibration" in {layer.name: layer.note for layer in report.layers}["borrowed"]


FUSED = {
    "Mixtral": {"num_local_experts": 4, "intermediate_size": 16},
    "GptOss": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8, "intermediate_size": 16},
    "DeepseekV3": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 16,
                   "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
                   "first_k_dense_replace": 0, "num_key_value_heads": 4},
}  # fmt: skip


@pytest.mark.parametrize("family", FUSED)
def test_fused_experts_are_compressed_one_by_one(family):
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**sizes | FUSED[family])
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".experts." in name:
                parameter.normal_(std=0.2)
    ids = torch.randint(64, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = model(ids).logits
    few = copy.deepcopy(model)
    options = {"targets": ["experts"], "workers": 1, "method": "coded"}
    notes = [layer.note for layer in tnc.compress(few, tnc.Budget(bits_per_weight=9), [ids[:1, :1]], **options).layers]
    assert sum("calibration never" in note for note in notes) >= 2 * 2 * 2
    report = tnc.compress(model, tnc.Budget(bits_per_weight=9), [ids], **options)
    assert len(report.layers) == 2 * 4 * 2
    assert {"0.gate_up_proj", "3.down_proj"} <= {layer.name.partition("experts.")[2] for layer in report.layers}
    with torch.no_grad():
        gaps = (model(ids).logits - wanted).norm(dim=-1) / wanted.norm(dim=-1)
    # Of a few tokens, errors change the experts that are chosen.
    assert gaps.median() < 0.05
