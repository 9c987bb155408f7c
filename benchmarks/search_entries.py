"""Entry sorts with their price (EinSort) beside quantisers and networks: error against total bits per weight.

On N(0, 1) and on six real matrices, and means over these; signal to noise in dB (10 log10 of energy over squared error), all
bits counted, the permutation as packed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from typing import Any

import torch
from experiments import ENCODER, LANGUAGE, experiment, means
from torch import Tensor

import tensornet_compress as tnc
from tensornet_compress.bench.harness import Job
from tensornet_compress.bench.peer_packages import Unavailable
from tensornet_compress.bench.tensors import weight_of
from tensornet_compress.bench.weights import MEASURES as WEIGHTS
from tensornet_compress.coding import parse_format
from tensornet_compress.decompose import realise
from tensornet_compress.report import Measure, Row
from tensornet_compress.searching.entries import entropy_coded, sort_entries
from tensornet_compress.tensor import NetworkSpec

Coded = tuple[Tensor, int]
LIMITS = (3.32, 4.32)
"""What 3 and 4 bit integers in groups of 64 take at any shape here, scales and zero points included."""
NOISE, MEAN = "N(0, 1)", "mean of the real matrices"
MATRICES = {
    "smollm2 layer 10 k_proj": (LANGUAGE, "model.layers.10.self_attn.k_proj"),
    "smollm2 layer 10 gate_proj": (LANGUAGE, "model.layers.10.mlp.gate_proj"),
    "smollm2 layer 0 q_proj": (LANGUAGE, "model.layers.0.self_attn.q_proj"),
    "minilm layer 3 query": (ENCODER, "encoder.layer.3.attention.self.query"),
    "minilm layer 3 intermediate": (ENCODER, "encoder.layer.3.intermediate.dense"),
    "minilm position embeddings": (ENCODER, "embeddings.position_embeddings"),
}
MEASURES = {
    "bits_per_weight": WEIGHTS["bits_per_weight"],
    "snr": Measure(title="signal to noise", unit="dB", better="higher", explanation="10 log10 of energy over squared error."),
}


@cache
def matrix(name: str) -> Tensor:
    if name == NOISE:
        return torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0))
    return weight_of(*MATRICES[name]).detach().float().contiguous()


def sorted_entries(given: Tensor, **options: Any) -> Coded:
    if given.shape[1] % options.get("groups", 1):
        raise Unavailable(f"rows of {given.shape[1]} do not divide into {options['groups']} groups")
    fit = sort_entries(given, **options)
    return fit.dense, 8 * fit.nbytes


def rounded(given: Tensor, fmt: str) -> Coded:
    network = realise(given, NetworkSpec.dense(tuple(given.shape), parse_format(fmt)))
    return network.to_dense(torch.float32), 8 * network.nbytes


def stepped(given: Tensor, share: float) -> Coded:
    return entropy_coded(given, share * float(given.std()))


def truncated(given: Tensor, bits: float) -> Coded:
    nbytes = int(bits * given.numel() / 8)
    network = tnc.to_network(given, tnc.Topology.two_cores(2, (0,)), max_bytes=nbytes, fmt=parse_format("fp16"))
    return network.to_dense(torch.float32), 8 * network.nbytes


def train(given: Tensor, bits: float) -> Coded:
    nbytes = int(bits * given.numel() / 8)
    result = tnc.search(given, max_bytes=nbytes, topologies=("tt",), formats=("fp16",), orderings=(), null=False)
    trains = [found.network for found in result.found if found.family == "tt"]
    if not trains:
        raise Unavailable("no such train fits")
    return trains[0].to_dense(torch.float32), 8 * trains[0].nbytes


METHODS: dict[str, Callable[[Tensor], Coded]] = {
    "global sort, rank 2": partial(sorted_entries, kind="global", rank=2),
    "row sort, rank 1": partial(sorted_entries, kind="row", rank=1),
    "row sort, rank 2": partial(sorted_entries, kind="row", rank=2),
    "row sort of magnitudes, rank 1": partial(sorted_entries, kind="row", rank=1, nonnegative=True),
    **{f"blocks of {size}, rank 1": partial(sorted_entries, kind="block", size=size, rank=1) for size in (8, 16, 32, 64)},
    **{f"row sort, {n} tied groups": partial(sorted_entries, kind="row", groups=n, rank=1) for n in (4, 8, 16, 32)},
    **{f"round to nearest, int{bits}g64z": partial(rounded, fmt=f"int{bits}g64z") for bits in (2, 3, 4)},
    **{f"uniform step of {share:g} deviations + entropy coder": partial(stepped, share=share) for share in (1.0, 0.5, 0.25)},
    "SVD in fp16, 4 bits": partial(truncated, bits=4),
    "TT in native order, fp16, 4 bits": partial(train, bits=4),
}


def coded(name: str, method: str) -> dict[str, Any]:
    given = matrix(name)
    dense, bits = METHODS[method](given)
    error = float((given - dense).double().square().sum() / given.double().square().sum())
    return {"values": {"bits_per_weight": bits / given.numel(), "snr": -10 * math.log10(max(error, 1e-30))}}


def searched(name: str, bits: float) -> dict[str, Any]:
    """The search with entry sorts among the orderings: its network, and what it says of the best sort."""
    given = matrix(name)
    limit = int(bits * given.numel() / 8)
    result = tnc.search(given, max_bytes=limit, orderings=("mode", "fibre", "entry"), time_budget=120)
    values = {"bits_per_weight": 8 * result.best.nbytes / given.numel(), "snr": -20 * math.log10(max(result.error, 1e-15))}
    sort, null = result.entry_sort, result.null
    told = {"sort": None if sort is None else sort.describe(), "null_gain": None if null is None else null.entry_gain}
    return {"values": values, "settings": told | {"family": result.choice.family}, "note": result.reason}


def jobs() -> Iterator[Job]:
    for name in (NOISE, *MATRICES):
        for method in METHODS:
            yield Job("search", name, method, partial(coded, name, method), ours="sort" in method or "blocks" in method)
        for bits in LIMITS:
            yield Job("search", name, f"search, at most {bits:g} bits", partial(searched, name, bits), ours=True)


def summary(rows: Sequence[Row]) -> Iterator[Row]:
    """Means of the methods that every real matrix has."""
    real = [row for row in rows if row.subject in MATRICES and row.skipped is None]
    whole = {row.method for row in real if sum(other.method == row.method for other in real) == len(MATRICES)}
    return means([row for row in real if row.method in whole], MEAN)


if __name__ == "__main__":
    experiment(jobs(), MEASURES, {}, summary)
