"""Tensors that are no weights: a photograph, and snapshots of two fields."""

from __future__ import annotations

import torch
from torch import Tensor

from tensornet_compress.errors import MissingExtraError


def image() -> Tensor:
    """scikit-learn's china.jpg averaged down, 0 to 1."""
    import numpy as np

    try:
        from sklearn.datasets import load_sample_image
    except ImportError as error:
        raise MissingExtraError("the image comes with scikit-learn; run: python -m pip install scikit-learn") from error

    pixels = torch.from_numpy(load_sample_image("china.jpg").astype(np.float32)).permute(2, 0, 1)[None]
    return torch.nn.functional.interpolate(pixels, (96, 128), mode="area")[0].permute(1, 2, 0) / 255


def heat_field(size: int, steps: int = 32) -> Tensor:
    """Snapshots (time, x, y) of the heat equation from random hot spots, walls held at zero; solved by sines."""
    generator = torch.Generator().manual_seed(0)
    start = torch.where(torch.rand(size, size, generator=generator) > 0.98, 1.0, 0.0)
    place = torch.arange(1, size + 1, dtype=torch.float32)
    sines = (2 / (size + 1)) ** 0.5 * torch.sin(torch.pi * place[:, None] * place / (size + 1))
    decay = (place[:, None] ** 2 + place**2) * (torch.pi / (size + 1)) ** 2
    modes = sines @ start @ sines
    return torch.stack([sines @ (modes * torch.exp(-decay * t)) @ sines for t in torch.linspace(0.5, 16, steps)])


def wave_field(size: int, steps: int = 32) -> Tensor:
    """Snapshots (time, x, y) of a wave leaving an off-centre bump in a box with reflecting walls; leapfrog steps."""
    x, y = torch.linspace(0, 1, size)[:, None], torch.linspace(0, 1, size)[None]
    now = torch.exp(-60 * ((x - 0.3) ** 2 + (y - 0.55) ** 2))
    before, frames = now.clone(), []
    for step in range(4 * steps):
        padded = torch.nn.functional.pad(now[None, None], (1, 1, 1, 1), mode="replicate")[0, 0]
        spread = padded[2:, 1:-1] + padded[:-2, 1:-1] + padded[1:-1, 2:] + padded[1:-1, :-2] - 4 * now
        now, before = 2 * now - before + 0.25 * spread, now
        if step % 4 == 3:
            frames.append(now)
    return torch.stack(frames)
