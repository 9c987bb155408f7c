"""Does llama.cpp answer from our GGUF exports what we answer from the folders? KL between the two, nats per token.

SmolLM2 is compressed in formats that GGUF holds without loss, saved, exported and run by llama.cpp (llama-cpp-python, built
from source on first use): as it is, where llama.cpp rounds the inputs of quantised products to 8 bits, and with the same blocks
decoded to fp32 by llama.cpp, where it does not. Beside it what rounding inputs alike changes in our own answers. Entropy-coded
layers are exported in 16 bits (``dtype="float16"``).
"""

from __future__ import annotations

import ctypes
import os
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from experiments import LANGUAGE, experiment
from torch import Tensor

import tensornet_compress as tnc
from tensornet_compress.bench.harness import STORED, Job
from tensornet_compress.bench.peer_packages import SIDE, Unavailable
from tensornet_compress.bench.peers.gguf_files import LlamaCpp
from tensornet_compress.evaluate import Reference, evaluate_language
from tensornet_compress.inputs import heldout_windows, load_causal_lm, load_tokenizer
from tensornet_compress.nn import TNLinear
from tensornet_compress.report import Measure

WINDOWS, LENGTH, BLOCK = 2, 256, 32
MEASURES = {
    "kl": Measure(title="llama.cpp to ours", unit="nats/token", better="lower"),
    "kl_decoded": Measure(title="its blocks in fp32 to ours", unit="nats/token", better="lower"),
    "kl_rounding": Measure(title="ours with rounded inputs to ours", unit="nats/token", better="lower"),
    "nbytes": STORED,
}


def beside(model: Any, file: Path) -> dict[str, Any]:
    """What llama.cpp answers from a file, beside a model of ours."""
    ids = heldout_windows(load_tokenizer(LANGUAGE), LENGTH, WINDOWS)
    ours = Reference(model, ids)
    values = {"kl": evaluate_language(LlamaCpp(file, plain=True), ids, ours).kl, "nbytes": float(file.stat().st_size)}
    values["kl_decoded"] = evaluate_language(LlamaCpp(in_fp32(file), plain=True), ids, ours).kl
    for module in model.modules():
        if isinstance(module, TNLinear):
            module.register_forward_pre_hook(rounded)
    values["kl_rounding"] = evaluate_language(model, ids, ours).kl
    return {"values": values}


def in_fp32(file: Path) -> Path:
    """The same file with every block decoded by llama.cpp."""
    api = SIDE.module("llama-cpp-python").llama_cpp
    parameters = api.llama_model_quantize_default_params()
    parameters.ftype, parameters.allow_requantize = api.LLAMA_FTYPE_ALL_F32, True
    decoded = file.with_suffix(".f32.gguf")
    if api.llama_model_quantize(os.fsencode(file), os.fsencode(decoded), ctypes.byref(parameters)):
        raise Unavailable("llama.cpp does not decode the file")
    return decoded


def rounded(_: Any, inputs: tuple[Tensor]) -> tuple[Tensor]:
    """Inputs of a layer to 8 bits in blocks of 32, as ggml's Q8_0 holds them."""
    blocks = inputs[0].unflatten(-1, (-1, BLOCK))
    scale = (blocks.abs().amax(-1, keepdim=True) / 127).clamp_min(1e-30)
    return (((blocks / scale).round() * scale.half().float()).flatten(-2),)


def exported(bits: float, targets: list[str] | None, formats: str | None = "gguf", dtype: str | None = None) -> dict[str, Any]:
    model = load_causal_lm(LANGUAGE)
    budget = tnc.Budget(bits_per_weight=bits)
    tnc.compress(model, budget, formats=formats, allocator="energy", targets=targets, workers=1)
    with tempfile.TemporaryDirectory() as place:
        folder = tnc.save(model, Path(place) / "saved", tokenizer=load_tokenizer(LANGUAGE))
        file = Path(place) / "saved.gguf"
        tnc.export(folder, file, to="gguf", dtype=dtype)
        return beside(tnc.load(folder), file)


def jobs() -> Iterator[Job]:
    for bits in (8.5, 4.5):
        yield Job("weights", "SmolLM2", "all layers", partial(exported, bits, None), bits, "bits/weight", ours=True)
    coded = partial(exported, 4.5, None, None, "float16")
    yield Job("weights", "SmolLM2", "all layers, coded, in 16 bits", coded, 4.5, "bits/weight", ours=True)
    few = partial(exported, 4.5, ["layers.0.mlp.*"])
    yield Job("weights", "SmolLM2", "one MLP", few, 4.5, "bits/weight", ours=True)


if __name__ == "__main__":
    experiment(jobs(), MEASURES, {"model": LANGUAGE, "windows": WINDOWS, "length": LENGTH})
