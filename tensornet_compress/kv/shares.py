"""How a cache's bits are shared out over the layers of the model."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from tensornet_compress.coding.entropy import classify
from tensornet_compress.kv.profile.profile import Profile

_ROWS = 512


def layer_bits(profile: Profile, bits: float, mode: Literal["live", "storage"]) -> list[tuple[int, float, float]]:
    """(layer, bits of a key element, bits of a value element) of the coded tokens, as calibrated.

    A live cache codes each layer by itself, so these are its fixed widths. A storage cache codes coefficients that span layers;
    each coefficient's expected bits are given to the layers by the energy that it puts in them.
    """
    if mode == "live":
        sides = [_live(profile, bits, place) for place in range(2)]
    else:
        sides = [_storage(profile, bits, "key"), _storage(profile, bits, "value")]
    return [(layer, float(key), float(value)) for layer, key, value in zip(profile.spec.layers, *sides)]


def _live(profile: Profile, bits: float, place: int) -> list[float]:
    codes = [pair[place] for pair in profile.live_codes(bits)]
    return [code.layout.bits_per_token / len(code.bits) for code in codes]


def _storage(profile: Profile, bits: float, side: Literal["key", "value"]) -> list[float]:
    tree, scale, step = profile.trees[side], profile.scale[side], profile.step(bits)
    classes = classify(scale, step)
    spent = profile.quantiser.entropy[classes.table] + classes.shift
    counts = [heads * tree.width for heads in profile.spec.heads]
    total = torch.zeros(len(counts), dtype=torch.float64)
    for component, cost in zip(classes.active.split(_ROWS), spent.split(_ROWS)):
        unit = torch.zeros(len(component), tree.components)
        unit[torch.arange(len(component)), component] = 1.0
        energy = _by_layer((tree.synthesise(unit) - tree.mean.float()).square(), counts).double()
        total += (energy / energy.sum(1, keepdim=True).clamp_min(1e-30) * cost[:, None]).sum(0)
    return [float(part) / count for part, count in zip(total, counts)]


def _by_layer(rows: Tensor, counts: list[int]) -> Tensor:
    return torch.stack([part.sum(1) for part in rows.split(counts, 1)], 1)
