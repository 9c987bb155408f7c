"""Long greedy generation: where a compressed cache first departs from the exact one, and how much agrees along its text."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache, partial
from statistics import mean, stdev
from typing import Any

import torch
from experiments import LANGUAGE, experiment
from torch import Tensor

from tensornet_compress.bench.caches import CacheBench, CacheSettings
from tensornet_compress.bench.harness import Job
from tensornet_compress.bench.speed_case import SpeedSettings
from tensornet_compress.bench.tracks.decoding import EXACT, Caches
from tensornet_compress.report import Measure

PROMPT, NEW, CHUNK, RATES, DOCUMENTS = 512, 512, 16, (4.0, 2.0), 9
KINDS = {"ours-storage": "ours-storage", "ours-live": "ours", "quantized-quanto": "quantized-quanto"}
MEASURES = {
    "first_divergence": Measure(title="first token that differs", unit="tokens", better="higher"),
    "agreement": Measure(title="equal choices along the exact text", better="higher"),
}


@cache
def caches() -> tuple[Caches, list[tuple[Tensor, Tensor]]]:
    """A calibrated profile, and held-out prompts with what the model says to each with the exact cache."""
    bench = CacheBench(CacheSettings.full(model=LANGUAGE, context=PROMPT, ahead=0, documents=DOCUMENTS))
    made = Caches(SpeedSettings.full(model=LANGUAGE), PROMPT)
    made.profile = bench.case.profile
    return made, [(prompt, greedy(made, prompt, EXACT, None)) for prompt in bench.windows()]


@torch.no_grad()
def greedy(made: Caches, prompt: Tensor, kind: str, bits: float | None) -> Tensor:
    options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
    generated: Tensor = made.model.generate(prompt[None], past_key_values=made.make(kind, bits), **options)
    return generated[0, PROMPT:]


@torch.no_grad()
def forced(made: Caches, prompt: Tensor, kind: str, bits: float, text: Tensor) -> Tensor:
    """Choices along a given text, so that one early departure does not hide what follows."""
    held = made.make(kind, bits)
    made.model(prompt[None], past_key_values=held, logits_to_keep=1)
    parts = [made.model(part[None], past_key_values=held).logits[0].argmax(-1) for part in text[:-1].split(CHUNK)]
    return torch.cat(parts)


def row(kind: str, bits: float) -> dict[str, Any]:
    """Means over documents, and their standard errors."""
    made, texts = caches()
    found: dict[str, list[float]] = {name: [] for name in MEASURES}
    for prompt, exact in texts:
        differ = torch.nonzero(greedy(made, prompt, kind, bits) != exact).flatten()
        found["first_divergence"].append(int(differ[0]) if len(differ) else NEW)
        equal = forced(made, prompt, kind, bits, exact) == exact[1:]
        found["agreement"].append(float(equal.float().mean()))
    return {
        "values": {name: mean(values) for name, values in found.items()},
        "errors": {name: stdev(values) / len(values) ** 0.5 for name, values in found.items()},
    }


def jobs() -> Iterator[Job]:
    for name, kind in KINDS.items():
        for bits in RATES:
            yield Job("kv", LANGUAGE, name, partial(row, kind, bits), bits, "bits/element", name.startswith("ours"))


if __name__ == "__main__":
    experiment(jobs(), MEASURES, {"prompt": PROMPT, "new": NEW, "documents": DOCUMENTS})
