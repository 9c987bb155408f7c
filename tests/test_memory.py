import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from tensornet_compress.memory import release, resident_bytes, trim

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux lists what is mapped")


def mapped(path):
    model = nn.Sequential(nn.Linear(512, 512, bias=False), nn.Linear(512, 512, bias=False))
    save_file(model.state_dict(), path)
    model.load_state_dict(load_file(path), assign=True)
    return model


def test_mapped_weights_are_let_go_and_read_again(tmp_path):
    model = mapped(tmp_path / "model.safetensors")
    before = [parameter.detach().clone() for parameter in model.parameters()]
    assert release(model) > 1.9 * 2**20
    assert release(model) == 0
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))
    assert release(model[0].weight) > 0.9 * 2**20


def test_weights_that_were_changed_or_lie_in_no_file_stay(tmp_path):
    model = mapped(tmp_path / "model.safetensors")
    with torch.no_grad():
        model[1].weight.add_(1)
    changed = model[1].weight.detach().clone()
    assert release(model[1]) == 0
    assert torch.equal(model[1].weight, changed)
    assert 0.9 * 2**20 < release(model) <= 2**20
    assert torch.equal(model[1].weight, changed)
    assert release(nn.Linear(512, 512)) == 0
    assert release(nn.Linear(4, 4, device="meta")) == 0


def test_what_was_freed_goes_back_to_the_system():
    """Small pieces with some kept between them: the C library would hold all of it."""
    pieces = [bytearray(b"x") * 4000 for _ in range(50_000)]
    kept = pieces[::500]
    del pieces
    before = resident_bytes()
    trim()
    assert resident_bytes() < before - (100 << 20)
    assert all(piece == b"x" * 4000 for piece in kept)
