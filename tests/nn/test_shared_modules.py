"""One module, or one weight, under two names."""

import torch

import tensornet_compress as tnc
import tensornet_compress.compressing


class Twice(torch.nn.Module):
    def __init__(self, same_module: bool):
        super().__init__()
        self.a = torch.nn.Linear(16, 16)
        self.b = self.a if same_module else torch.nn.Linear(16, 16)
        if not same_module:
            self.b.weight = self.a.weight

    def forward(self, x):
        return self.b(self.a(x))


def check(same_module, tmp_path):
    torch.manual_seed(0)
    model = Twice(same_module)
    report = tnc.compress(model, tnc.Budget(bits_per_weight=9), allocator="energy", method="dense", workers=1)
    assert len(report.layers) == 1
    assert report.nbytes == tnc.compressing.model_nbytes(model)
    x = torch.randn(3, 16)
    assert torch.equal(model.a.weight, model.b.weight)
    folder = tnc.save(model, tmp_path / "out")
    loaded = tnc.load(folder, model=Twice(same_module))
    assert torch.equal(loaded(x), model(x))


def test_one_module_under_two_names(tmp_path):
    check(True, tmp_path)


def test_one_weight_in_two_modules(tmp_path):
    check(False, tmp_path)
