"""What queries see of cached keys: their second moments, and the metric of attention outputs that follows from them.

An error dv of a value and dk of a key move the output of a query q by  a (dv + s (q . dk) (v - o)),  with a the attention
paid, s the scale of scores and o the output. Averaged over independent errors, keys are weighed by s^2 E|v - o|^2 times the sum
over heads of E[q q'], values by the number of query heads that read them; both are divided by the spread of a layer's values,
so that errors of all layers are relative. Forward passes are enough, where the Fisher metric needs backward passes; but it does
not know what later layers make of an output.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tensornet_compress.kv.live.attention import attending_with
from tensornet_compress.kv.rope import Rotary

NAME = "tensornet_compress_kv_queries"
_DISTANCES = 64


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
        self, spread: Tensor, value_width: int, heads: list[int], rotary: Rotary | None, tokens: int, ridge: float = 0.03
    ) -> tuple[Tensor, Tensor]:
        """The metric of keys and that of values, fp64 (units, width, width) with the width of each.

        Args:
            spread: mean squared distance of a unit's values, each of ``value_width`` channels, from their mean, fp64 (units,).
            heads: KV heads of every layer.
            rotary: given, queries are averaged over their distance to the keys, below ``tokens``.
            ridge: share of a unit's own mean curvature added to all directions.
        """
        seen = self.blocks / max(self.count, 1)
        if rotary is not None:
            seen = _over_distances(seen, rotary, tokens)
        layer_spread = torch.cat([part.mean().expand(len(part)) for part in spread.split(heads)]).clamp_min(1e-30)
        keys = (self.scaling**2 * spread / layer_spread)[:, None, None] * seen
        own = keys.diagonal(dim1=-2, dim2=-1).mean(-1)
        eye = torch.eye(keys.shape[-1], dtype=torch.float64)
        keys = keys + (ridge * own + 1e-3 * own.mean() + 1e-30)[:, None, None] * eye
        values = (self.heads / layer_spread)[:, None, None] * torch.eye(value_width, dtype=torch.float64)
        return keys, values


def _over_distances(blocks: Tensor, rotary: Rotary, tokens: int) -> Tensor:
    """Mean of R B R' over the distances of causal pairs, of which short ones are more frequent."""
    width = blocks.shape[-1]
    share = (torch.arange(_DISTANCES) + 0.5) / _DISTANCES
    distances = (tokens * (1 - (1 - share).sqrt())).long()
    turns = rotary.rotate(torch.eye(width).expand(_DISTANCES, -1, -1), distances[:, None]).mT.double()
    total = torch.zeros_like(blocks)
    for turn in turns:
        total += turn @ blocks @ turn.T
    return total / _DISTANCES


@contextmanager
def listening(model: nn.Module, heard: dict[int, tuple[Tensor, float]]) -> Iterator[None]:
    """Inside, every forward pass leaves in ``heard`` what each layer's attention was asked.

    Layer index -> queries as they met the keys, (batch, query heads, tokens, width), and the scale of scores.
    """

    def attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any) -> Any:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        scaling = options.get("scaling")
        index: Any = module.layer_idx
        heard[int(index)] = (query.detach(), query.shape[-1] ** -0.5 if scaling is None else float(scaling))
        return sdpa_attention_forward(module, query, key, value, mask, **options)

    with attending_with(model, NAME, attention):
        yield
