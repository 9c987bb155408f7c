"""How far entropy-coded integers are from the Gaussian rate-distortion bound in the Fisher metric, by kind of layer, how close
their bytes come to the entropy of their codes, and how fast they are decoded (one thread).

Real bits are those of the stored parts, steps and tables included. ``bound``: reverse water-filling for the same error in the
same metric, see ``metric/rate_bound.py``. ``entropy``: of the codes within their classes of scale, as counted;
``adaptive``: the same and what it takes to tell or learn the counts, half a logarithm of the class's size for each symbol.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import lru_cache, partial
from time import process_time
from typing import Any

import numpy as np
import torch
from experiments import ENCODER, LANGUAGE, experiment

from tensornet_compress.bench.harness import Job
from tensornet_compress.bench.weight_case import WEIGHT_METHODS
from tensornet_compress.bench.weights import WeightBench, WeightSettings
from tensornet_compress.coding import CodedFormat, trellis
from tensornet_compress.coding.coded_matrix import CodedMatrix
from tensornet_compress.metric.rate_bound import gaussian_bits
from tensornet_compress.nn import NetworkModule
from tensornet_compress.report import Measure

METHOD, BITS = "ours-coded", (4.5, 3.5, 3.0, 2.5)
KINDS = {
    LANGUAGE: (
        "embed_tokens", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj",
        "mlp.up_proj", "mlp.down_proj",
    ),
    ENCODER: (
        "word_embeddings", "self.query", "self.key", "self.value", "attention.output.dense", "intermediate.dense",
        r"\d\.output.dense",
    ),
}  # fmt: skip
PLAIN = re.compile(r"\\d\\.")
MEASURES = {
    "bits_per_weight": Measure(title="bits per weight", unit="bits", better="lower"),
    "bound": Measure(title="Gaussian bound", unit="bits", better="lower", role="other"),
    "gap": Measure(title="above the bound", unit="bits", better="lower", role="quality"),
    "over_entropy": Measure(title="real / entropy", better="lower"),
    "over_adaptive": Measure(title="real / adaptive entropy", better="lower"),
    "symbols_per_second": Measure(title="decoded symbols", unit="M/s", better="higher", role="time"),
    "decoding": Measure(title="decoding", unit="s", better="lower"),
}


@lru_cache(maxsize=1)
def compressed(model: str, bits: float) -> dict[str, dict[str, float]]:
    """What each layer of a model takes, by name."""
    bench = judge(model)
    WEIGHT_METHODS[METHOD].run(bench.case, bits)
    survey = bench.case.memo["survey", "coded"]
    metrics = {layer.name: layer.loaded_metric() for job in survey.jobs for layer in job.layers}
    found = {}
    for target in bench.case.targets:
        module = bench.case.model.get_submodule(target.name)
        assert isinstance(module, NetworkModule)
        fmt = module.spec.terms[0].formats[0]
        if not isinstance(fmt, CodedFormat):
            continue
        matrix, parts = bench.case.matrix(target), {"_coded": next(iter(module.stored().values()))}
        began = process_time()
        coded = fmt.coded(parts, module.spec.shape)
        seconds = process_time() - began
        lost = matrix - torch.from_numpy(coded.to_dense())
        entropy, learning = code_bits(coded)
        found[target.name] = {
            "weights": matrix.numel(),
            "real": 8 * fmt.stored,
            "bound": gaussian_bits(matrix, metrics[target.name], metrics[target.name].norm2(lost)),
            "entropy": entropy,
            "adaptive": entropy + learning,
            "seconds": seconds,
        }
    bench.case.put_back()
    return found


@lru_cache(maxsize=1)
def judge(model: str) -> WeightBench:
    """The model with all of its layers, embeddings included, and its calibration; what decoding compiles is compiled."""
    bench = WeightBench(WeightSettings.full(model=model, targets=("*",)))
    small = CodedFormat(step=1.0)
    small.coded(small.encode(torch.randn(64, 64)), (64, 64))
    return bench


def code_bits(coded: CodedMatrix) -> tuple[float, float]:
    """Entropy of what is coded within its classes, and the bits to learn the counts of each class: of a trellis the levels,
    those of its two quantisers apart."""
    level, side = trellis.levels(coded.codes) if coded.states else (coded.codes, 0)
    codes = level.astype(np.int64)
    kinds = 2 * ((coded.row_scale - coded.row_scale.min())[:, None] + (coded.column_scale - coded.column_scale.min())) + side
    span = int(codes.max() - codes.min()) + 1
    seen, counts = np.unique(kinds.ravel() * span + (codes - codes.min()).ravel(), return_counts=True)
    of_class = seen // span
    totals = np.bincount(of_class, weights=counts)
    symbols = np.bincount(of_class)
    learning = 0.5 * np.maximum(symbols - 1, 0) * np.log2(np.maximum(totals, 1))
    return float((counts * (np.log2(totals[of_class]) - np.log2(counts))).sum()), float(learning.sum())


def row(model: str, kind: str, bits: float) -> dict[str, Any]:
    """All layers of a kind together."""
    layers = compressed(model, bits)
    own = [layer for name, layer in layers.items() if re.search(rf"{kind}$", name)]
    return {"values": summed(own), "settings": {"layers": len(own)}}


def summed(layers: Sequence[dict[str, float]]) -> dict[str, float]:
    total = {name: sum(layer[name] for layer in layers) for name in layers[0]}
    return {
        "bits_per_weight": total["real"] / total["weights"],
        "bound": total["bound"] / total["weights"],
        "gap": (total["real"] - total["bound"]) / total["weights"],
        "over_entropy": total["real"] / total["entropy"],
        "over_adaptive": total["real"] / total["adaptive"],
        "symbols_per_second": total["weights"] / 1e6 / max(total["seconds"], 1e-9),
        "decoding": total["seconds"],
    }


def jobs() -> Iterator[Job]:
    for model, kinds in KINDS.items():
        for bits in BITS:
            for kind in (*kinds, ""):
                subject = f"{model}: {PLAIN.sub('', kind) or 'all layers'}"
                yield Job("weights", subject, METHOD, partial(row, model, kind, bits), bits, "bits/weight", ours=True)


if __name__ == "__main__":
    experiment(jobs(), MEASURES, {"metric": "fisher", "calibration": "that of bench weights"})
