"""Trains and trees fitted in the metric (ALS) against the same networks fitted in the Euclidean norm, and against two cores.

    python benchmarks/geometry_networks.py

One layer of each kind from the middle of SmolLM2-135M and of MiniLM, bf16 cores, native digits, equal bytes (each network takes
what it can use of the same budget). ``calibration`` and ``heldout``: squared error over the squared norm of the layer's outputs
on the inputs of calibration and of held-out texts. ``divergence``: what the model's output loses with that one layer replaced,
on held-out texts (SmolLM2: KL in nats per token; MiniLM: one minus the cosine of sentence embeddings).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from time import process_time
from typing import Any

import torch
from common import LENGTH, MODEL, original_layers, write_result
from encoder_table import _encode, _sentences
from torch import Tensor

from tensornet_compress.calibrate import collect_statistics
from tensornet_compress.coding import parse_format
from tensornet_compress.decompose import bond_spectra, feasible_ranks, ranks_for_bytes, realise
from tensornet_compress.evaluate import Reference, compare_embeddings, evaluate_language, sentence_embeddings
from tensornet_compress.inputs import (
    calibration_windows,
    heldout_windows,
    load_causal_lm,
    load_encoder,
    load_tokenizer,
    wikipedia_articles,
)
from tensornet_compress.metric import KroneckerMetric, input_second_moment
from tensornet_compress.nn import find_targets, layer_weight, replace_module
from tensornet_compress.options import native_layout
from tensornet_compress.tensor import Layout, NetworkSpec, TermSpec, Topology

SHARES = (0.4,)
SWEEPS = 4
FAMILIES = ("two cores", "tt", "ttm", "tree")
BF16 = parse_format("bf16")
ENCODER = "all-minilm-l6-v2"


@dataclass
class Subject:
    """A model with the layers to replace, input moments by layer on both texts, and its divergence from the original."""

    name: str
    model: Any
    layers: list[str]
    calibration: dict[str, Tensor]
    heldout: dict[str, Tensor]
    divergence: Callable[[], float]


def moments(model: Any, names: list[str], batches: list[Any]) -> dict[str, Tensor]:
    return {name: found.input.mean for name, found in collect_statistics(model, batches, names, ["input"]).items()}


def middle(model: Any, block: str) -> list[str]:
    return [target.name for target in find_targets(model)[0] if block in target.name]


def language() -> Subject:
    tokenizer, model = load_tokenizer(MODEL), load_causal_lm(MODEL, torch.float32)
    layers = middle(model, "layers.15.")
    fitted, held = calibration_windows(tokenizer, LENGTH, 16), heldout_windows(tokenizer, LENGTH, 8)
    reference = Reference(model, held[:2])

    def divergence() -> float:
        return evaluate_language(model, held[:2], reference).kl or 0.0

    collected = [moments(model, layers, list(windows.split(4))) for windows in (fitted, held)]
    return Subject(MODEL, model, layers, *collected, divergence)


def encoder() -> Subject:
    tokenizer, model = load_tokenizer(ENCODER), load_encoder(ENCODER, torch.float32)
    layers = middle(model, "layer.3.")
    articles = wikipedia_articles()
    split = int(0.6 * len(articles))
    fitted, held = _sentences(articles[:split], 192), _sentences(articles[split:], 64)
    before = sentence_embeddings(model, tokenizer, held)

    def divergence() -> float:
        return 1 - compare_embeddings(before, sentence_embeddings(model, tokenizer, held)).mean_cosine

    collected = [
        moments(model, layers, [_encode(tokenizer, texts[i : i + 16]) for i in range(0, len(texts), 16)])
        for texts in (fitted, held)
    ]
    return Subject(ENCODER, model, layers, *collected, divergence)


def network_spec(weight: Tensor, family: str, share: float) -> NetworkSpec:
    """The richest network of a family within ``share`` of the bf16 bytes, by the spectra of its unfoldings."""
    shape = tuple(weight.shape)
    allowed = int(share * 2 * weight.numel())
    layout, topology = Layout.native(shape), Topology.two_cores(2, (0,))
    ranks = [allowed // (2 * sum(shape))]
    if family != "two cores":
        placed = native_layout(shape, family)  # type: ignore[arg-type]
        assert placed is not None
        layout, topology = placed
        spectra = bond_spectra(layout.apply(weight), topology)
        ranks = list(feasible_ranks(ranks_for_bytes(spectra, allowed, layout, topology, BF16), layout, topology))
    term = TermSpec(layout=layout, topology=topology, ranks=tuple(ranks), formats=(BF16,) * len(topology.legs))
    return NetworkSpec.model_validate({"shape": shape, "dtype": "float32", "terms": (term,)})


def relative(weight: Tensor, change: Tensor, moment: Tensor) -> float:
    metric = KroneckerMetric(columns=moment)
    return metric.norm2(change) / metric.norm2(weight)


def rows(subject: Subject) -> Iterator[dict[str, Any]]:
    for name in subject.layers:
        weight = layer_weight(subject.model.get_submodule(name)).detach().float().contiguous()
        metric = input_second_moment(subject.calibration[name])
        for share in SHARES:
            for family in FAMILIES:
                spec = network_spec(weight, family, share)
                for label, chosen in (("euclidean", None), ("input", metric)):
                    started = process_time()
                    network = realise(weight, spec, chosen, sweeps=SWEEPS)
                    seconds = process_time() - started
                    change = weight - network.to_dense(torch.float32)
                    row: dict[str, Any] = {"model": subject.name, "layer": name, "shape": list(weight.shape), "share": share}
                    row |= {"network": family, "metric": label, "ranks": list(spec.terms[0].ranks), "nbytes": network.nbytes}
                    row["euclidean"] = float(change.square().sum() / weight.square().sum())
                    row["calibration"] = relative(weight, change, subject.calibration[name])
                    row["heldout"] = relative(weight, change, subject.heldout[name])
                    with original_layers(subject.model):
                        replace_module(subject.model, name, network)
                        row["divergence"] = subject.divergence()
                    yield row | {"seconds": seconds}


def main() -> None:
    torch.set_num_threads(1)
    found: list[dict[str, Any]] = []
    for make in (encoder, language):
        for row in rows(make()):
            found.append(row)
            print({key: round(v, 4) if isinstance(v, float) else v for key, v in row.items()}, flush=True)
        write_result("geometry_networks", {"settings": {"shares": SHARES, "sweeps": SWEEPS, "format": "bf16"}, "rows": found})


if __name__ == "__main__":
    main()
