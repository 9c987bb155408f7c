"""Reading text with compressed networks: EasyOCR's recogniser (convolutions and LSTMs) and its detector (convolutions), beside
rounding to nearest, each output channel with a scale of its own.

``character_errors``: edits of greedy readings over the characters of held-out lines, worn on purpose. ``overlap``: mean
intersection over union of the words on held-out pages with the boxes that are found; ``found``: share of words with a box that
they overlap by half.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import cache, partial
from typing import Any

import torch
from experiments import experiment
from ocr_networks import edits, find, lines, network, overlap, pages, read
from torch import nn

import tensornet_compress as tnc
from tensornet_compress.bench.harness import Job
from tensornet_compress.compressing import model_nbytes, survey_model
from tensornet_compress.report import Measure

BITS, LINES, PAGES, CALIBRATION = (8.0, 6.0, 5.0, 4.0, 3.0, 2.0), 60, 8, {"recogniser": 16, "detector": 4}
MEASURES = {
    "character_errors": Measure(title="character errors", better="lower", role="quality"),
    "overlap": Measure(title="overlap of words", better="higher", role="quality"),
    "found": Measure(title="words found", better="higher"),
    "bits_per_weight": Measure(title="bits per weight", unit="bits", better="lower", role="size"),
    "nbytes": Measure(title="whole network", unit="bytes", better="lower"),
}


@cache
def heldout(name: str) -> Any:
    return lines(LINES, True) if name == "recogniser" else pages(PAGES, True)


def quality(name: str, model: nn.Module) -> dict[str, float]:
    if name == "recogniser":
        wrong = sum(edits(read(model, line), line.text) for line in heldout(name))
        return {"character_errors": wrong / sum(len(line.text) for line in heldout(name))}
    best = []
    for page in heldout(name):
        boxes = find(model, page)
        best += [max((overlap(box, word) for box in boxes), default=0.0) for word in page.boxes]
    return {"overlap": sum(best) / len(best), "found": sum(share >= 0.5 for share in best) / len(best)}


@cache
def calibration(name: str) -> list[torch.Tensor]:
    make: Any = lines if name == "recogniser" else pages
    return [one.pixels for one in make(CALIBRATION[name], False)]


@cache
def survey() -> Any:
    """Of the detector, whose layers are all its own; serves every size."""
    return survey_model(network("detector"), calibration("detector"))


def original(name: str) -> dict[str, Any]:
    model = network(name)
    return {"values": quality(name, model) | {"bits_per_weight": 32.0, "nbytes": model_nbytes(model)}}


def ours(name: str, bits: float) -> dict[str, Any]:
    model = copy.deepcopy(network(name))
    known = {"survey": survey()} if name == "detector" else {}
    report = tnc.compress(model, tnc.Budget(bits_per_weight=bits), calibration(name), workers=1, **known)
    return {"values": quality(name, model) | {"bits_per_weight": report.bits_per_weight, "nbytes": report.nbytes}}


@torch.no_grad()
def rounded(name: str, bits: float) -> dict[str, Any]:
    model, weights, stored = copy.deepcopy(network(name)), 0, 0.0
    for matrix in model.parameters():
        if matrix.ndim > 1:
            rows = matrix.flatten(1)
            scale = (rows.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)).half().float().clamp_min(1e-7)
            matrix.copy_(((rows / scale).round() * scale).view_as(matrix))
            weights, stored = weights + matrix.numel(), stored + bits * matrix.numel() + 16 * len(rows)
    nbytes = model_nbytes(model) - 4 * weights + int(stored / 8)
    return {"values": quality(name, model) | {"bits_per_weight": stored / weights, "nbytes": nbytes}}


def jobs() -> Iterator[Job]:
    for name in ("recogniser", "detector"):
        yield Job("weights", name, "original", partial(original, name))
        for method, make in {"rounding": rounded, "ours": ours}.items():
            for bits in BITS:
                yield Job("weights", name, method, partial(make, name, bits), bits, "bits/weight", method == "ours")


if __name__ == "__main__":
    experiment(jobs(), MEASURES, {"lines": LINES, "pages": PAGES, "calibration": CALIBRATION})
