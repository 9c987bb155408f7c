"""Small problems whose curvature is known or can be measured."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Linear(nn.Module):
    """One linear map without bias, in float64."""

    def __init__(self, outputs: int, inputs: int, seed: int = 0):
        super().__init__()
        self.map = nn.Linear(inputs, outputs, bias=False, dtype=torch.float64)
        with torch.no_grad():
            self.map.weight.copy_(torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(seed)))

    def forward(self, x: Tensor) -> Tensor:
        return self.map(x)


def correlated_inputs(count: int, size: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(size, size, generator=generator, dtype=torch.float64)
    return torch.randn(count, size, generator=generator, dtype=torch.float64) @ mixing


def least_squares(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Half the mean squared error: its Hessian is ``I (x) E[x x']``."""
    x, y = batch
    return 0.5 * (model(x) - y).square().sum(1).mean()


def logistic(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])
