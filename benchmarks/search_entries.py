"""Sorted entries (EinSort) beside entropy-coded rounding, integers and a truncated SVD at equal bytes, with everything counted
and with the order for nothing.

On N(0, 1), on a layer of each kind of SmolLM2 and MiniLM, and on cached keys: signal to noise in dB (10 log10 of energy over
squared error, Euclidean) within 3.32 and 4.32 bits a number.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from typing import Any

import torch
from experiments import experiment, means
from torch import Tensor

import tensornet_compress as tnc
from tensornet_compress.bench.harness import Job
from tensornet_compress.bench.peer_packages import Unavailable
from tensornet_compress.bench.tensors import find_tensor
from tensornet_compress.bench.weights import MEASURES as WEIGHTS
from tensornet_compress.bisection import least_kept
from tensornet_compress.coding import CodedFormat, NumberFormat, SortedFormat, parse_format
from tensornet_compress.options.sorted_entries import sorted_within
from tensornet_compress.report import Measure, Row

NOISE, KEYS = "N(0, 1)", "cached keys"
BITS = (3.32, 4.32)
"""What 3 and 4 bit integers in groups of 64 take at any shape here, scales and zero points included."""
MODELS = {
    "mean of SmolLM2": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    "mean of MiniLM": ("query", "key", "value", "attention-output", "intermediate", "output"),
}
LAYERS = {f"{model.split()[-1].lower()}-{kind}": model for model, kinds in MODELS.items() for kind in kinds}
SUBJECTS = (NOISE, *LAYERS, KEYS)
MEASURES = {
    "bits_per_weight": WEIGHTS["bits_per_weight"],
    "snr": Measure(title="signal to noise", unit="dB", better="higher", explanation="10 log10 of energy over squared error."),
    "order_bits": Measure(
        title="bits of the order", better="lower", explanation="What the entropy-coded order takes a number."
    ),
}


@cache
def matrix(name: str) -> Tensor:
    """A matrix whose rows are sorted: of cached keys a channel of a head."""
    if name == NOISE:
        return torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0))
    if name == KEYS:
        return find_tensor("kv-keys").load().transpose(1, 2).flatten(0, 1).contiguous()
    return find_tensor(name).load()


def stored(given: Tensor, fmt: NumberFormat) -> tnc.TensorNetwork:
    return tnc.realise(given, tnc.NetworkSpec.dense(tuple(given.shape), fmt))


def tied(given: Tensor, bits: float, run: Callable[[Tensor], int], rank: int = 1) -> tnc.TensorNetwork:
    """Groups as even steps of the mean sorted run make them."""
    fmt = sorted_within(given, run(given), rank, max_bytes=int(bits * given.numel() / 8))
    if fmt is None:
        raise Unavailable(f"{bits:g} bits do not hold it")
    return stored(given, fmt)


def equal(given: Tensor, bits: float) -> tnc.TensorNetwork:
    """Groups of equal sizes: the most that fit."""
    for groups in range(int(2**bits), 1, -1):
        network = stored(given, SortedFormat(run=given.shape[1], groups=groups))
        if 8 * network.nbytes <= bits * given.numel():
            return network
    raise Unavailable(f"{bits:g} bits do not hold it")


def coded(given: Tensor, bits: float) -> tnc.TensorNetwork:
    """One step and an entropy coder, in the Euclidean metric."""

    def keeps(step: float) -> bool:
        return 8 * stored(given, CodedFormat(step=step)).nbytes <= bits * given.numel()

    deviation = float(given.std())
    return stored(given, CodedFormat(step=least_kept(keeps, deviation / 64, deviation * 8, ratio=1.02)))


def rounded(given: Tensor, bits: float) -> tnc.TensorNetwork:
    """Round to nearest in groups with zero points: the widest grid that fits."""
    names = [f"int{width}g{group}z" for width in (4, 3, 2) for group in (64, 128, 256)]
    fitting = [network for name in names if 8 * (network := stored(given, parse_format(name))).nbytes <= bits * given.numel()]
    if not fitting:
        raise Unavailable(f"{bits:g} bits do not hold integers in groups")
    return max(fitting, key=lambda network: network.nbytes)


def truncated(given: Tensor, bits: float, fmt: str) -> tnc.TensorNetwork:
    nbytes = int(bits * given.numel() / 8)
    return tnc.to_network(given, tnc.Topology.two_cores(2, (0,)), max_bytes=nbytes, fmt=parse_format(fmt))


SORTS: dict[str, Callable[[Tensor, float], tnc.TensorNetwork]] = {
    "sorted rows, equal groups": equal,
    "sorted rows": partial(tied, run=lambda given: given.shape[1]),
    "sorted rows, rank 2": partial(tied, run=lambda given: given.shape[1], rank=2),
    "sorted blocks of 64": partial(tied, run=lambda given: 64),
    "all entries sorted": partial(tied, run=lambda given: given.numel()),
}
OTHERS: dict[str, Callable[[Tensor, float], tnc.TensorNetwork]] = {
    "ec": coded,
    "integers in groups": rounded,
    "SVD, fp16": partial(truncated, fmt="fp16"),
    "SVD, int4": partial(truncated, fmt="int4g64z"),
}
FREE = ", order for nothing"


def measured(name: str, make: Callable[[Tensor, float], tnc.TensorNetwork], bits: float, free: bool = False) -> dict[str, Any]:
    """``free``: the order, which decodes the same, is left out of the bytes."""
    given = matrix(name)
    network = make(given, bits)
    error = float((given - network.to_dense(torch.float32)).double().square().sum() / given.double().square().sum())
    order = network.stored["core0_ties"].nbytes if "core0_ties" in network.stored else 0
    values = {"snr": -10 * math.log10(max(error, 1e-30)), "order_bits": 8 * order / given.numel()}
    values["bits_per_weight"] = 8 * (network.nbytes - free * order) / given.numel()
    return {"values": values, "settings": {"spec": network.spec.describe()}}


def jobs() -> Iterator[Job]:
    for name in SUBJECTS:
        for bits in BITS:
            for method, make in (SORTS | OTHERS).items():
                yield Job("search", name, method, partial(measured, name, make, bits), bits, "bits", ours=method in SORTS)
            yield Job(
                "search",
                name,
                f"sorted rows{FREE}",
                partial(measured, name, SORTS["sorted rows"], bits, True),
                bits,
                "bits",
                True,
            )


def summary(rows: Sequence[Row]) -> Iterator[Row]:
    """Means over the layers of a model, of what all of them have."""
    for title, kinds in MODELS.items():
        mine = [row for row in rows if LAYERS.get(row.subject) == title and row.skipped is None]
        counts = {(row.method, row.budget): 0 for row in mine}
        for row in mine:
            counts[row.method, row.budget] += 1
        yield from means([row for row in mine if counts[row.method, row.budget] == len(kinds)], title)


if __name__ == "__main__":
    experiment(jobs(), MEASURES, {}, summary)
