import copy

import pytest
import torch
from torch import nn

import tensornet_compress as tnc
from tensornet_compress.errors import TargetError
from tensornet_compress.nn import KeptModules, build_replacement, replace_module
from tests.models import batches, tiny_convnet, tiny_gpt2, tiny_llama


def exact(module):
    weight = module.weight.T if type(module).__name__ == "Conv1D" else module.weight
    return tnc.to_network(weight, tnc.Topology.two_cores(weight.ndim, (0,)), ranks=min(weight.shape[0], weight[0].numel()))


def test_replaced_models_give_the_same_and_materialise_back():
    for model, name in ((tiny_llama(), "model.layers.0.mlp.up_proj"), (tiny_gpt2(), "transformer.h.1.attn.c_attn")):
        ids = batches(1)[0]
        wanted = model(ids).logits
        kind = type(model.get_submodule(name))
        replace_module(model, name, exact(model.get_submodule(name)))
        assert isinstance(model.get_submodule(name), tnc.TNLinear)
        assert torch.allclose(model(ids).logits, wanted, atol=1e-4)
        assert tnc.materialize(model) is model
        assert type(model.get_submodule(name)) is kind
        assert torch.allclose(model(ids).logits, wanted, atol=1e-4)


def test_a_tied_head_stays_tied_through_replacement_copy_and_materialisation():
    model = tiny_llama(tied=True)
    ids = batches(1)[0]
    wanted = model(ids).logits
    network = tnc.to_network(model.lm_head.weight, ranks=32)
    replace_module(model, "model.embed_tokens", network, ("lm_head",))
    for copied in (model, copy.deepcopy(model)):
        embedding, head = copied.model.embed_tokens, copied.lm_head
        assert isinstance(embedding, tnc.TNEmbedding)
        assert isinstance(head, tnc.TNLinear)
        assert all(getattr(embedding, name) is getattr(head, name) for name in network.stored)
        assert torch.allclose(copied(ids).logits, wanted, atol=1e-4)
    tnc.materialize(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.allclose(model(ids).logits, wanted, atol=1e-4)


def test_a_compression_is_undone_with_the_norms_that_it_trained():
    model = tiny_llama()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    kept = KeptModules(model)
    replace_module(model, "model.layers.0.mlp.up_proj", tnc.to_network(model.model.layers[0].mlp.up_proj.weight, ranks=4))
    with torch.no_grad():
        model.model.layers[1].input_layernorm.weight.mul_(1.5)
    kept.put_back()
    after = model.state_dict()
    assert set(after) == set(before)
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_convolutions_are_replaced():
    model = tiny_convnet()
    x = torch.randn(2, 3, 12, 12)
    wanted = model(x)
    for name in ("stem", "depthwise", "wide", "head"):
        replace_module(model, name, exact(model.get_submodule(name)))
    assert torch.allclose(model(x), wanted, atol=1e-4)
    assert torch.allclose(tnc.materialize(model)(x), wanted, atol=1e-4)


def test_other_modules_cannot_hold_a_network():
    with pytest.raises(TargetError, match="LayerNorm"):
        build_replacement(nn.LayerNorm(3), tnc.to_network(torch.ones(3, 3), ranks=1))


def test_what_a_module_tells_of_itself_is_told_by_its_replacement():
    conv1d = tiny_gpt2().transformer.h[0].mlp.c_fc
    told = {
        nn.Linear(5, 4): ("in_features", "out_features"),
        nn.Embedding(5, 4, padding_idx=2): (
            "num_embeddings",
            "embedding_dim",
            "padding_idx",
            "max_norm",
            "norm_type",
            "sparse",
        ),
        nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2): (
            *("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode"),
            *("transposed", "output_padding"),
        ),
        conv1d: ("nf", "nx"),
    }
    for module, names in told.items():
        replaced = build_replacement(module, exact(module))
        assert {name: getattr(replaced, name) for name in names} == {name: getattr(module, name) for name in names}
        assert replaced.weight.shape == module.weight.shape
        assert torch.allclose(replaced.weight, module.weight, atol=1e-5)
        assert (getattr(replaced, "bias", None) is None) == (getattr(module, "bias", None) is None)


def test_a_model_that_reads_the_stride_of_its_convolution():
    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3, stride=2)

        def forward(self, x):
            return self.conv(x)[..., : x.shape[-1] // self.conv.stride[0]]

    model, x = Reader(), torch.randn(1, 3, 9, 9)
    wanted = model(x)
    replace_module(model, "conv", exact(model.conv))
    assert torch.allclose(model(x), wanted, atol=1e-4)


def test_one_network_under_two_names_materialises_to_one_layer():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    model.append(model[0])
    replace_module(model, "0", exact(model[0]), ("2",))
    assert model[0] is model[2]
    tnc.materialize(model)
    assert type(model[2]) is nn.Linear
    assert model[0] is model[2]
