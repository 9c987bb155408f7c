"""Streamed second moments of a cache, and the metrics that weigh its errors.

``fisher``: the curvature of the loss, from its gradients at keys and values.

``queries``: an error dv of a value and dk of a key move the output of a query q by  a (dv + s (q . dk) (v - o)),  with a the
attention paid, s the scale of scores and o the output. Averaged over independent errors, keys are weighed by s^2 E|v - o|^2
times the sum over heads of E[q q'], values by the number of query heads that read them; both are divided by the spread of a
layer's values, so that errors of all layers are relative. Forward passes are enough, where the Fisher metric needs backward
passes; but it does not know what later layers make of an output.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tensornet_compress.calibrate import InputMoment
from tensornet_compress.kv.profile.capture import Captured
from tensornet_compress.kv.profile.tree import rows_of
from tensornet_compress.kv.rope import Rotary
from tensornet_compress.metric.blocks import ridged

RIDGE = 0.03
"""Share of a unit's own mean curvature added to all directions of a metric."""
_DISTANCES = 64


class SideMoments:
    """Mean and covariance of one side over all units, summed in fp64, products in fp32."""

    def __init__(self, channels: int):
        self.total = torch.zeros(channels, dtype=torch.float64)
        self.products = InputMoment()

    @property
    def count(self) -> int:
        """Tokens seen."""
        return self.products.count

    def add(self, rows: Tensor) -> None:
        """Rows fp32 (tokens, channels)."""
        self.total += rows.double().sum(0)
        self.products.add(rows)

    def mean(self) -> Tensor:
        """fp32 (channels,)."""
        return (self.total / max(self.count, 1)).float()

    def covariance(self) -> Tensor:
        """fp32 (channels, channels), with a relative ridge so that directions never seen keep a little variance."""
        mean = self.total / max(self.count, 1)
        covariance = self.products.mean - torch.outer(mean, mean)
        covariance.diagonal().add_(1e-6 * covariance.diagonal().mean().clamp_min(1e-12))
        return covariance.float()


class QueryMoments:
    """Second moments of queries without rotary positions, per unit (layer, KV head), summed over the heads that share it."""

    def __init__(self, units: int, width: int):
        self.count = 0
        self.heads = torch.ones(units, dtype=torch.float64)
        self.scaling = torch.ones(units, dtype=torch.float64)
        self.blocks = torch.zeros(units, width, width, dtype=torch.float64)

    def add(self, queries: list[Tensor], scaling: list[float], heads: list[int]) -> None:
        """One sequence.

        Args:
            queries: per layer, plain, fp32 (query heads, tokens, width). scaling: of the scores of every layer.
            heads: KV heads of every layer; query heads are shared out among them in order.
        """
        unit = 0
        for asked, scale, count in zip(queries, scaling, heads):
            for rows in asked.unflatten(0, (count, -1)):
                self.heads[unit], self.scaling[unit] = len(rows), scale
                flat = rows.flatten(0, 1)
                self.blocks[unit] += (flat.T @ flat).double()
                unit += 1
        self.count += queries[0].shape[1]

    def metric(
        self, spread: Tensor, value_width: int, heads: list[int], rotary: Rotary | None, tokens: int, ridge: float = RIDGE
    ) -> tuple[Tensor, Tensor]:
        """The metric of keys and that of values, fp64 (units, width, width) with the width of each.

        Args:
            spread: mean squared distance of a unit's values, each of ``value_width`` channels, from their mean, fp64 (units,).
            heads: KV heads of every layer.
            rotary: given, queries are averaged over their distance to the keys, below ``tokens``.
        """
        seen = self.blocks / max(self.count, 1)
        if rotary is not None:
            # Of causal pairs, short distances are more frequent.
            share = (torch.arange(_DISTANCES) + 0.5) / _DISTANCES
            seen = rotary.average(seen, (tokens * (1 - (1 - share).sqrt())).long())
        layer_spread = torch.cat([part.mean().expand(len(part)) for part in spread.split(heads)]).clamp_min(1e-30)
        keys = (self.scaling**2 * spread / layer_spread)[:, None, None] * seen
        values = (self.heads / layer_spread)[:, None, None] * torch.eye(value_width, dtype=torch.float64)
        return ridged(keys, ridge), values


def side_rows(captured: Captured, sinks: int) -> dict[str, Tensor]:
    """Rows of both sides without the first ``sinks`` tokens, which a cache keeps exact."""
    return {
        "key": rows_of([k[:, sinks:] for k in captured.keys]),
        "value": rows_of([v[:, sinks:] for v in captured.values]),
    }
