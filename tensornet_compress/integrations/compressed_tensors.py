"""Linear layers in the format ``pack-quantized`` of compressed-tensors, which transformers and vLLM load.

Only grids with their zero point in the middle are written: of packed zero points transformers (5.23 with compressed-tensors
0.20) expects another shape than compressed-tensors writes, and with more than one scheme it cannot make layers dense either.
Codes minus zero points fit such a grid with one bit more.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import gcd
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from tensornet_compress.coding.bits import pack_bits
from tensornet_compress.integrations.grids import Grid

FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("query", "key", "value"))
"""Layers that vLLM joins to one, which must then be of one scheme."""


@dataclass(frozen=True)
class Scheme:
    """Codes of ``bits`` bits in groups of ``width``; 0: one group a row."""

    bits: int
    width: int

    def to_json(self) -> dict[str, Any]:
        """As a configuration tells it."""
        strategy = {"strategy": "group", "group_size": self.width} if self.width else {"strategy": "channel"}
        return {"num_bits": self.bits, "type": "int", "symmetric": True, "dynamic": False} | strategy

    @classmethod
    def holding(cls, grids: Sequence[Grid], allowed: Sequence[int]) -> Self:
        """The smallest scheme of an allowed number of bits that holds grids (for which ``bits_of`` is enough) without loss."""
        bits = min(bits for bits in allowed if bits >= max(map(bits_of, grids)))
        rows_only = all(grid.width == grid.codes.shape[1] for grid in grids)
        return cls(bits, 0 if rows_only else gcd(*(grid.width for grid in grids)))

    def parts(self, grid: Grid) -> dict[str, Tensor]:
        """A grid -> the tensors that stand for ``weight``."""
        grid = grid.regrouped(self.width or grid.width).symmetric(self.bits)
        # Every row is packed for itself, from the lowest bits up, and filled to whole words.
        padded = F.pad(grid.codes, (0, -grid.codes.shape[1] % 32))
        words = pack_bits(padded, self.bits).view(torch.int32).view(len(padded), -1)
        used = -(-grid.codes.shape[1] * self.bits // 32)
        shape = torch.tensor(grid.codes.shape)
        return {"weight_packed": words[:, :used].contiguous(), "weight_scale": grid.scale, "weight_shape": shape}


def bits_of(grid: Grid) -> int:
    """Bits that codes minus zero points take."""
    return grid.bits + (not bool((grid.zero == 1 << (grid.bits - 1)).all()))


def fused(names: Iterable[str]) -> Iterator[list[str]]:
    """All names, each once, those that are joined to one layer together."""
    left = dict.fromkeys(names)
    while left:
        first = next(iter(left))
        parent, dot, leaf = first.rpartition(".")
        family = next((family for family in FUSED if leaf in family), (leaf,))
        together = [name for name in (parent + dot + leaf for leaf in family) if name in left]
        yield together
        for name in together:
            del left[name]


def configuration(schemes: Mapping[str, Scheme]) -> dict[str, Any]:
    """``quantization_config`` of layers by name."""
    groups: dict[Scheme, list[str]] = {}
    for name, scheme in schemes.items():
        groups.setdefault(scheme, []).append(name)
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            f"group_{number}": {"targets": names, "weights": scheme.to_json()}
            for number, (scheme, names) in enumerate(groups.items())
        },
    }
