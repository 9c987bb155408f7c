"""Real tensors: bytes at equal error of the usual formats, of TTNOpt's tree, and of the search.

    PYTHONPATH=.peers python benchmarks/search_real.py [--errors 0.1 0.3] [--budget 30]

Every row chooses among the same number formats (4, 6 and 8 bit integers, bf16, fp32; ``dense`` also 2, 3 and 5 bits) and
ranks by the same rule. SVD cuts axes; TT and the balanced tree (HT) take the digits of the axes in native order; TTNOpt takes
the same digits, its tree is given our ranks and formats, and it is left out, with the reason, above 65,536 entries, where its
four-legged tensors take hours. What is not ``measured`` is predicted from spectra: more than 1.3 times the dense size.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from importlib.util import find_spec
from time import perf_counter
from typing import Any

import torch
from common import MODEL, RESULTS, language_inputs, write_result
from torch import Tensor

import tensornet_compress as tnc
from tensornet_compress.bench.peers.search.ttnopt import available, optimal_tree
from tensornet_compress.decompose import feasible_ranks, ranks_for_error, realise
from tensornet_compress.network import TermSpec, parse_format
from tensornet_compress.searching.candidates import Shape, for_error, rounding_error, tensorize
from tensornet_compress.searching.engine import CORE_FORMATS
from tensornet_compress.searching.shapes import native_shapes
from tensornet_compress.searching.store import SpectrumStore

PEERS = {"SVD": "svd", "TT, native order": "tt", "HT, balanced": "tree"}
LARGEST_FOR_TTNOPT = 1 << 16
LAYER, BLOCK, TOKENS, KEYS = 10, 3, 4096, 256


def tensors() -> Iterator[tuple[str, Tensor]]:
    """A layer of every kind, embeddings (their first 4,096 tokens), keys of a layer, an image and a field."""
    from tensornet_compress.inputs import load_encoder

    model, _, _, heldout = language_inputs(1)
    layer = model.model.layers[LAYER]
    for kind in ("q", "k", "v", "o"):
        yield f"SmolLM2 {kind}_proj", layer.self_attn.get_submodule(f"{kind}_proj").weight
    for kind in ("gate", "up", "down"):
        yield f"SmolLM2 {kind}_proj", layer.mlp.get_submodule(f"{kind}_proj").weight
    yield f"SmolLM2 embeddings, first {TOKENS} tokens", model.model.embed_tokens.weight[:TOKENS]
    block = load_encoder("all-minilm-l6-v2").encoder.layer[BLOCK]
    for name in ("query", "key", "value"):
        yield f"MiniLM {name}", block.attention.self.get_submodule(name).weight
    yield "MiniLM attention output", block.attention.output.dense.weight
    yield "MiniLM intermediate", block.intermediate.dense.weight
    yield "MiniLM output", block.output.dense.weight
    words = load_encoder("all-minilm-l6-v2").embeddings.word_embeddings.weight
    yield f"MiniLM embeddings, first {TOKENS} tokens", words[:TOKENS]
    with torch.no_grad():
        keys = model(heldout[:, :KEYS], use_cache=True).past_key_values.layers[LAYER].keys
    yield f"KV cache, keys of {KEYS} tokens", keys[0]
    if find_spec("sklearn") is not None:
        yield "image (china.jpg, 96 x 128 x 3)", image()
    else:
        print("no image: scikit-learn is not installed", flush=True)
    yield "wave field (32 x 32 x 32)", wave_field(32)
    yield "heat field (32 x 32 x 32)", heat_field(32)


def image() -> Tensor:
    """scikit-learn's china.jpg averaged down, 0 to 1."""
    import numpy as np
    from sklearn.datasets import load_sample_image

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


def peer(tensor: Tensor, family: Any, error: float) -> dict[str, Any]:
    """The smallest network of one family in native order."""
    result = tnc.search(tensor, max_error=error, topologies=(family,), orderings=(), null=False, time_budget=120)
    measured = [f.nbytes for f in result.found if f.family != "dense" and f.error <= error]
    if measured:
        return {"nbytes": min(measured), "measured": True}
    predicted = [event.nbytes for event in result.history if event.what.endswith("predicted")]
    return {"nbytes": min(predicted) if predicted else unmerged(tensor, family, error), "measured": False}


def unmerged(tensor: Tensor, family: Any, error: float) -> int:
    """Predicted bytes of a network that the search refuses, as one core would hold no more numbers."""
    tensorization = tensorize(tuple(tensor.shape))
    store = SpectrumStore(tensorization.apply(tensor), precise=False)
    sizes = []
    for shape in native_shapes(tensorization, (family,)):
        layout, topology = shape.laid_out()
        spectra = [store.spectrum(shape.topology.side(bond)) for bond in range(len(topology.edges))]
        for fmt in map(parse_format, CORE_FORMATS):
            allowed = error**2 - rounding_error(fmt) * len(topology.legs)
            if allowed > 0:
                ranks = feasible_ranks(ranks_for_error(spectra, allowed * store.energy, layout, topology), layout, topology)
                formats = (fmt,) * len(topology.legs)
                sizes.append(TermSpec(layout=layout, topology=topology, ranks=tuple(ranks), formats=formats).nbytes)
    return min(sizes)


def ttnopt(tensor: Tensor, error: float) -> dict[str, Any]:
    """TTNOpt's tree over the same digits with our ranks and formats."""
    missing = available()
    if missing is not None:
        return {"skipped": missing}
    if tensor.numel() > LARGEST_FOR_TTNOPT:
        return {"skipped": f"{tensor.numel():,} entries, more than {LARGEST_FOR_TTNOPT:,}"}
    tensorization = tensorize(tuple(tensor.shape))
    store = SpectrumStore(tensorization.apply(tensor))
    began = perf_counter()
    tree = optimal_tree(store.modes, 1e-3 * error, 2)
    seconds = perf_counter() - began
    shape = Shape("ttnopt", tensorization, tree.topology, ordered=True)
    found: list[int] = []
    for name in CORE_FORMATS:
        for slack in (1.0, 0.97, 0.94, 1.03, 1.1, 1.2, 1.4):
            candidate = for_error(shape, store, parse_format(name), error, slack)
            if candidate is None or candidate.nbytes > 1.3 * min([*found, tensor.numel()]):
                continue
            network = realise(tensor, candidate.spec)
            if float((network.to_dense() - tensor).norm() / tensor.norm()) <= error:
                found.append(network.nbytes)
    if not found:
        return {"skipped": "more bytes than 1.3 of 8 bit integers", "seconds": seconds}
    return {"nbytes": min(found), "measured": True, "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--errors", type=float, nargs="+", default=[0.1, 0.3])
    parser.add_argument("--budget", type=float, default=30.0, help="seconds for a search, null control included")
    parser.add_argument("--only", nargs="+", default=[""], help="tensors whose names hold one of these; other rows stay")
    arguments = parser.parse_args()
    path = RESULTS / "search_real.json"
    rows: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []
    cases = [(name, tensor.detach().float().contiguous()) for name, tensor in tensors()]
    for error in arguments.errors:
        for name, tensor in cases:
            if not any(part in name for part in arguments.only):
                continue
            limit = error / 10 if "field" in name else error
            began = perf_counter()
            result = tnc.search(tensor, max_error=limit, time_budget=arguments.budget)
            seconds = perf_counter() - began
            assert result.null is not None
            row: dict[str, Any] = {"tensor": name, "shape": list(tensor.shape), "error": limit}
            row["dense"] = min(f.nbytes for f in result.found if f.family == "dense" and f.error <= limit)
            row |= {label: peer(tensor, family, limit) for label, family in PEERS.items()}
            row["TTNOpt's tree"] = ttnopt(tensor, limit)
            row["ours"] = {"nbytes": result.best.nbytes, "family": result.choice.family, "ordered": result.choice.ordered}
            row["ours"] |= {"error": result.error, "seconds": seconds, "finished": result.finished}
            row["gain"], row["null_gain"] = result.gain, result.null.gain
            others = [row["dense"], *(row[label]["nbytes"] for label in (*PEERS, "TTNOpt's tree") if "nbytes" in row[label])]
            row["ours_over_best"] = row["ours"]["nbytes"] / min(others)
            rows = [r for r in rows if (r["tensor"], r["error"]) != (name, limit)] + [row]
            names = [other for other, _ in cases]
            rows = sorted((r for r in rows if r["tensor"] in names), key=lambda r: (names.index(r["tensor"]), r["error"]))
            print(row, flush=True)
            settings = {"model": MODEL, "layer": LAYER, "block": BLOCK, "budget": arguments.budget}
            write_result("search_real", {"settings": settings, "rows": rows})


if __name__ == "__main__":
    main()
