"""A small transformer and a small CNN trained on scikit-learn's handwritten digits, for ``claims.py``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

Example = tuple[Tensor, Tensor]
EPOCHS, COPIES, NOISE = 30, 15, 0.35


class DigitTransformer(nn.Module):
    """Two pre-norm encoder blocks over the 16 patches (2 x 2) of a digit."""

    def __init__(self, width: int = 64, heads: int = 4, layers: int = 2):
        super().__init__()
        self.embed = nn.Linear(4, width)
        self.position = nn.Parameter(0.02 * torch.randn(16, width))
        self.blocks = nn.ModuleList(DigitBlock(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        patches = F.unfold(images, 2, stride=2).transpose(1, 2)
        x = self.embed(patches) + self.position
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1))


class DigitBlock(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        count, length, width = x.shape
        q, k, v = self.qkv(self.first(x)).view(count, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(count, length, width)
        x = x + self.out(attended)
        return x + self.down(F.gelu(self.up(self.second(x))))


class DigitCNN(nn.Module):
    """Three convolutions and two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 32, 3, padding=1), nn.Conv2d(32, 64, 3, padding=1)
        self.third = nn.Conv2d(64, 64, 3, padding=1)
        self.wide, self.head = nn.Linear(256, 96), nn.Linear(96, 10)

    def forward(self, images: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.second(F.relu(self.first(images)))), 2)
        x = F.max_pool2d(F.relu(self.third(x)), 2)
        return self.head(F.relu(self.wide(x.flatten(1))))


ARCHITECTURES: dict[str, Callable[[], nn.Module]] = {"transformer": DigitTransformer, "cnn": DigitCNN}
# The layers that are compressed: all but the tiny first one and the head.
IGNORED = {"transformer": ["embed", "head"], "cnn": ["first", "head"]}


@dataclass
class Digits:
    """Batches of 32 images (32, 1, 8, 8) and labels: 60 % to train on, 15 % to choose by, 25 % held out. ``fresh``: the images
    to train on again, each time with other noise, one list of batches per copy."""

    train: list[Example]
    validation: list[Example]
    heldout: list[Example]
    fresh: list[list[Example]]

    @classmethod
    def load(cls, seed: int) -> Digits:
        """Standardised digits with Gaussian noise, so that the task is not solved perfectly."""
        data = load_digits()
        generator = torch.Generator().manual_seed(seed)
        clean = torch.tensor(data.images, dtype=torch.float32)[:, None] / 8 - 1
        images = clean + NOISE * torch.randn(clean.shape, generator=generator)
        order = torch.randperm(len(images), generator=generator)
        images, clean, labels = images[order], clean[order], torch.tensor(data.target)[order]
        batches = list(zip(images.split(32), labels.split(32)))
        cut, end = int(0.6 * len(batches)), int(0.75 * len(batches))
        known, answers = clean[: 32 * cut], labels[: 32 * cut]
        fresh = []
        for _ in range(COPIES):
            noisy = known + NOISE * torch.randn(known.shape, generator=generator)
            order = torch.randperm(len(known), generator=generator)
            fresh.append(list(zip(noisy[order].split(32), answers[order].split(32))))
        return cls(batches[:cut], batches[cut:end], batches[end:], fresh)


def loss(model: nn.Module, batch: Example, reduction: str = "mean") -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], reduction=reduction)


def trained(architecture: str, digits: Digits, seed: int) -> nn.Module:
    """A model trained on the images with other noise in every epoch; ``fresh[0]`` is left for fine-tuning."""
    torch.manual_seed(seed)
    model, copies = ARCHITECTURES[architecture](), [digits.train, *digits.fresh[1:]]
    optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, EPOCHS * len(digits.train))
    for epoch in range(EPOCHS):
        for batch in copies[epoch % len(copies)]:
            optimiser.zero_grad()
            loss(model, batch).backward()
            optimiser.step()
            schedule.step()
    return model.eval()
