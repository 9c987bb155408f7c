"""Streamed second moments of a cache and of the loss's gradient at it."""

from __future__ import annotations

import torch
from torch import Tensor

from tensornet_compress.kv.profile.capture import Captured


class SideMoments:
    """Mean and covariance of one side over all units, summed in fp64, products in fp32."""

    def __init__(self, channels: int):
        self.count = 0
        self.total = torch.zeros(channels, dtype=torch.float64)
        self.products = torch.zeros(channels, channels, dtype=torch.float64)

    def add(self, rows: Tensor) -> None:
        """Rows fp32 (tokens, channels)."""
        self.count += len(rows)
        self.total += rows.double().sum(0)
        self.products += (rows.T @ rows).double()

    def mean(self) -> Tensor:
        """fp32 (channels,)."""
        return (self.total / max(self.count, 1)).float()

    def covariance(self) -> Tensor:
        """fp32 (channels, channels), with a relative ridge so that directions never seen keep a little variance."""
        mean = self.total / max(self.count, 1)
        found = self.products / max(self.count, 1) - torch.outer(mean, mean)
        found.diagonal().add_(1e-6 * found.diagonal().mean().clamp_min(1e-12))
        return found.float()


class SideSensitivity:
    """Fisher blocks of one side, one (width, width) per unit."""

    def __init__(self, units: int, width: int):
        self.count = 0
        self.blocks = torch.zeros(units, width, width, dtype=torch.float64)

    def add(self, gradients: Tensor) -> None:
        """Gradients fp32 (units, tokens, width) of one sequence."""
        self.blocks += (gradients.mT @ gradients).double()
        self.count += gradients.shape[1]

    def metric(self, within: float = 0.03, across: float = 1e-3) -> Tensor:
        """Mean blocks with a ridge: ``within`` of the unit's own mean curvature plus ``across`` of all units' mean."""
        blocks = self.blocks / max(self.count, 1)
        own = blocks.diagonal(dim1=-2, dim2=-1).mean(-1)
        ridge = within * own + across * own.mean() + 1e-30
        return blocks + ridge[:, None, None] * torch.eye(blocks.shape[-1], dtype=torch.float64)


def rows_of(states: list[Tensor]) -> Tensor:
    """Per layer (heads, tokens, channels) -> (tokens, units * channels), units layer by layer, head by head."""
    return torch.cat(states, 0).permute(1, 0, 2).flatten(1).contiguous()


def layers_of(rows: Tensor, heads: list[int], width: int) -> list[Tensor]:
    """The inverse of ``rows_of``."""
    return list(rows.view(len(rows), -1, width).permute(1, 0, 2).split(heads, 0))


def side_rows(captured: Captured, sinks: int) -> dict[str, Tensor]:
    """Rows of both sides without the first ``sinks`` tokens, which a cache keeps exact."""
    return {
        "key": rows_of([k[:, sinks:] for k in captured.keys]),
        "value": rows_of([v[:, sinks:] for v in captured.values]),
    }
