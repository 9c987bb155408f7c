"""Entry sorts with their price (EinSort) beside quantisers and networks: error against total bits per weight.

    python benchmarks/search_entries.py

On N(0, 1) and on six real matrices; signal-to-noise in dB (10 log10 of energy over squared error), all bits counted.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from common import write_result
from torch import Tensor

import tensornet_compress as tnc
from tensornet_compress.coding import parse_format
from tensornet_compress.decompose import realise
from tensornet_compress.searching.entries import entropy_coded, sort_entries
from tensornet_compress.tensor import NetworkSpec

Coded = tuple[Tensor, int]
BITS = (3.32, 4.32)
"""What 3 and 4 bit integers in groups of 64 take at any shape here, scales and zero points included."""


def sorts(matrix: Tensor) -> dict[str, Callable[[], Coded]]:
    def sort(**options: Any) -> Callable[[], Coded]:
        def make() -> Coded:
            fit = sort_entries(matrix, **options)
            return fit.dense, 8 * fit.nbytes

        return make

    found = {
        "global sort, rank 2": sort(kind="global", rank=2),
        "row sort, rank 1": sort(kind="row", rank=1),
        "row sort, rank 2": sort(kind="row", rank=2),
        "row sort of magnitudes, rank 1": sort(kind="row", rank=1, nonnegative=True),
    }
    for size in (8, 16, 32, 64):
        found[f"blocks of {size}, rank 1"] = sort(kind="block", size=size, rank=1)
    for groups in (4, 8, 16, 32):
        if matrix.shape[1] % groups == 0:
            found[f"row sort, {groups} tied groups"] = sort(kind="row", groups=groups, rank=1)
    return found


def others(matrix: Tensor) -> dict[str, Callable[[], Coded]]:
    def rounded(name: str) -> Callable[[], Coded]:
        def make() -> Coded:
            network = realise(matrix, NetworkSpec.dense(tuple(matrix.shape), parse_format(name)))
            return network.to_dense(torch.float32), 8 * network.nbytes

        return make

    def truncated(bits: float) -> Callable[[], Coded]:
        def make() -> Coded:
            topology = tnc.Topology.two_cores(2, (0,))
            network = tnc.to_network(matrix, topology, max_bytes=int(bits * matrix.numel() / 8), fmt=parse_format("fp16"))
            return network.to_dense(torch.float32), 8 * network.nbytes

        return make

    def train(bits: float) -> Callable[[], Coded]:
        def make() -> Coded:
            result = tnc.search(
                matrix,
                max_bytes=int(bits * matrix.numel() / 8),
                topologies=("tt",),
                formats=("fp16",),
                orderings=(),
                null=False,
            )
            network = next(f.network for f in result.found if f.family == "tt")
            return network.to_dense(torch.float32), 8 * network.nbytes

        return make

    deviation = float(matrix.std())
    found: dict[str, Callable[[], Coded]] = {}
    for bits in (2, 3, 4):
        found[f"round to nearest, int{bits}g64z"] = rounded(f"int{bits}g64z")
    for share in (1.0, 0.5, 0.25):
        found[f"uniform step of {share:g} deviations + entropy coder"] = lambda share=share: entropy_coded(
            matrix, share * deviation
        )
    found["SVD in fp16, 4 bits"] = truncated(4)
    found["TT in native order, fp16, 4 bits"] = train(4)
    return found


def searched(name: str, matrix: Tensor, bits: float) -> dict[str, Any]:
    """The search with entry sorts among the orderings: its network, and what it says of the best sort."""
    limit = int(bits * matrix.numel() / 8)
    result = tnc.search(matrix, max_bytes=limit, orderings=("mode", "fibre", "entry"), time_budget=120)
    sort, null = result.entry_sort, result.null
    row = {
        "tensor": name,
        "method": f"search, at most {bits:g} bits",
        "bits_per_weight": 8 * result.best.nbytes / matrix.numel(),
    }
    row |= {"snr_db": -20 * math.log10(max(result.error, 1e-15)), "family": result.choice.family, "reason": result.reason}
    row |= {"sort": None if sort is None else sort.describe(), "null_gain": None if null is None else null.entry_gain}
    print(row, flush=True)
    return row


def matrices() -> dict[str, Tensor]:
    from tensornet_compress.inputs import load_causal_lm, load_encoder

    lm, encoder = load_causal_lm("smollm2-135m").model, load_encoder("all-minilm-l6-v2")
    layer, block = lm.layers[10], encoder.encoder.layer[3]
    found = {
        "N(0, 1), 1024 x 1024": torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0)),
        "smollm2 layer 10 k_proj": layer.self_attn.k_proj.weight,
        "smollm2 layer 10 gate_proj": layer.mlp.gate_proj.weight,
        "smollm2 layer 0 q_proj": lm.layers[0].self_attn.q_proj.weight,
        "minilm layer 3 query": block.attention.self.query.weight,
        "minilm layer 3 intermediate": block.intermediate.dense.weight,
        "minilm position embeddings": encoder.embeddings.position_embeddings.weight,
    }
    return {name: tensor.detach().float().contiguous() for name, tensor in found.items()}


def main() -> None:
    rows: list[dict[str, Any]] = []
    for name, matrix in matrices().items():
        for method, make in (sorts(matrix) | others(matrix)).items():
            try:
                dense, bits = make()
            except (tnc.TensorNetError, StopIteration) as error:
                rows.append({"tensor": name, "method": method, "skipped": str(error) or "no such network fits"})
                continue
            error = float((matrix - dense).double().square().sum() / matrix.double().square().sum())
            decibel = -10 * math.log10(max(error, 1e-30))
            rows.append({"tensor": name, "method": method, "bits_per_weight": bits / matrix.numel(), "snr_db": decibel})
            print(f"{name:30} {method:45} {bits / matrix.numel():6.3f} b  {decibel:6.2f} dB", flush=True)
        rows += [searched(name, matrix, bits) for bits in BITS]
        write_result("search_entries", {"rows": rows})


if __name__ == "__main__":
    main()
