"""Does llama.cpp answer from our GGUF exports what we answer from the folders? KL between the two, nats per token.

SmolLM2 is compressed in formats that GGUF holds without loss, saved, exported and run by llama.cpp (llama-cpp-python, built
from source on first use). llama.cpp rounds the inputs of quantised products to 8 bits, which is the difference that remains;
the bundled model's own file, beside the same file decoded by us, shows how much that is.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from experiments import KL, LANGUAGE, experiment

import tensornet_compress as tnc
from tensornet_compress.bench.harness import STORED, Job
from tensornet_compress.bench.peers.gguf_files import LlamaCpp
from tensornet_compress.evaluate import Reference, evaluate_language
from tensornet_compress.inputs import heldout_windows, load_causal_lm, load_tokenizer
from tensornet_compress.inputs.models import EMBEDDED_MODELS, package_folder
from tensornet_compress.report import Measure

WINDOWS, LENGTH = 4, 256
MEASURES = {
    "kl": KL,
    "same_token": Measure(title="same likeliest token", better="higher"),
    "nbytes": STORED,
}


def beside(model: Any, file: Path) -> dict[str, Any]:
    """What llama.cpp answers from a file, beside a model of ours."""
    ids = heldout_windows(load_tokenizer(LANGUAGE), LENGTH, WINDOWS)
    quality = evaluate_language(LlamaCpp(file), ids, Reference(model, ids))
    return {"values": {"kl": quality.kl, "same_token": quality.top1, "nbytes": float(file.stat().st_size)}}


def exported(bits: float) -> dict[str, Any]:
    model = load_causal_lm(LANGUAGE)
    budget = tnc.Budget(bits_per_weight=bits)
    tnc.compress(model, budget, formats="gguf", allocator="energy", workers=1)
    with tempfile.TemporaryDirectory() as place:
        folder = tnc.save(model, Path(place) / "saved", tokenizer=load_tokenizer(LANGUAGE))
        file = Path(place) / "saved.gguf"
        tnc.export(folder, file, to="gguf")
        return beside(tnc.load(folder), file)


def original() -> dict[str, Any]:
    (file,) = package_folder(EMBEDDED_MODELS[LANGUAGE]).glob("*.gguf")
    return beside(load_causal_lm(LANGUAGE), file)


def jobs() -> Iterator[Job]:
    yield Job("model", "SmolLM2", "the bundled file itself", original)
    for bits in (8.5, 5.5, 4.5):
        yield Job("model", "SmolLM2", "our export", partial(exported, bits), bits, "bits/weight", ours=True)


if __name__ == "__main__":
    experiment(jobs(), MEASURES, {"model": LANGUAGE, "windows": WINDOWS, "length": LENGTH})
