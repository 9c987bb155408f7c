"""Tests for looking into a model while it runs."""

import copy

import torch
from torch import Tensor, nn

from tensornet_compress.calibrate.hooks import evaluating, frozen


class Recurrent(nn.Module):
    """Keeps what it gave as its state, as RecurrentGemma does."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.state: Tensor | None = None

    def forward(self, inputs: Tensor) -> Tensor:
        self.state = self.linear(inputs if self.state is None else inputs + self.state)
        return self.state


def test_a_pass_with_gradients_leaves_no_graph_on_a_module() -> None:
    model = Recurrent()
    with frozen(model):
        model(torch.ones(2, 4, requires_grad=True)).sum().backward()
    assert model.state is None
    copy.deepcopy(model)


def test_a_pass_without_gradients_keeps_a_module_s_state() -> None:
    model = Recurrent()
    with evaluating(model), torch.no_grad():
        given = model(torch.ones(2, 4))
    assert model.state is given
