"""Forward of one layer: our two-core module beside two matrices by hand, the dense layer and tensorly-torch's TT-matrix."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tensornet_compress as tnc
from tensornet_compress.bench.peers.weights.tensorly import digits
from tensornet_compress.bench.race import race
from tensornet_compress.bench.side import SIDE, Unavailable
from tensornet_compress.bench.speed import OURS, TRACKS, Heat, SpeedSettings, Timed, Track
from tensornet_compress.coding import parse_format
from tensornet_compress.decompose.tensorly_adapter import tensorly_backend

SHAPES = ((576, 576), (1536, 576))


class ByHand(nn.Module):
    """The module that one would write by hand: two matrices, two matmuls."""

    def __init__(self, left: Tensor, right: Tensor):
        super().__init__()
        self.left, self.right = nn.Parameter(left.clone()), nn.Parameter(right.clone())

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        return F.linear(F.linear(x, self.right), self.left)


def heats(settings: SpeedSettings) -> Iterator[Heat]:
    """Each shape at each batch size."""

    def heat(shape: tuple[int, int], batch: int) -> Heat:
        names = (OURS, "ours-int8", "ours-int4-dense", "by-hand", "dense", "tltorch-ttm")
        subject = f"forward of {shape[0]} x {shape[1]}, batch {batch}"
        return Heat(subject, names, lambda: _forward(settings, shape, batch))

    for shape in SHAPES[1:] if settings.quick else SHAPES:
        for batch in settings.batches:
            yield heat(shape, batch)


def _forward(settings: SpeedSettings, shape: tuple[int, int], batch: int) -> Timed:
    torch.manual_seed(settings.seed)
    out_features, in_features = shape
    rank = int(settings.keep * out_features * in_features / (out_features + in_features))
    dense = nn.Linear(in_features, out_features, bias=False)
    weight = dense.weight.detach()
    cut = tnc.Topology.two_cores(2, (0,))
    network = tnc.to_network(weight, cut, ranks=rank)
    left, right = network.cores()
    integers = tnc.to_network(weight, cut, ranks=rank, fmt=parse_format("int8g64"))
    whole = tnc.to_network(weight, tnc.Topology.one_core(2), ranks=1, fmt=parse_format("int4g64o"))
    modules: dict[str, Callable[[Tensor], Any]] = {
        OURS: tnc.TNLinear.from_linear(dense, network),
        "ours-int8": tnc.TNLinear.from_linear(dense, integers),
        "ours-int4-dense": tnc.TNLinear.from_linear(dense, whole),
        "by-hand": ByHand(left, right),
        "dense": dense,
    }
    missing = {}
    try:
        modules["tltorch-ttm"] = _tltorch(shape, int(settings.keep * out_features * in_features))
    except Unavailable as reason:
        missing["tltorch-ttm"] = str(reason)
    x = torch.randn(batch, in_features)
    calls = {name: _call(module, x) for name, module in modules.items()}
    return Timed(race(calls, settings.rounds), missing, settings={"rank": rank, "keep": settings.keep})


def _call(module: Callable[[Tensor], Any], x: Tensor) -> Callable[[], object]:
    return lambda: module(x)


def _tltorch(shape: tuple[int, int], numbers: int) -> Callable[[Tensor], Any]:
    """A TT-matrix layer of tensorly-torch with about ``numbers`` parameters."""
    tltorch: Any = SIDE.module("tensorly-torch")
    out_digits, in_digits = (digits(size) for size in shape)
    with tensorly_backend():
        layer = tltorch.FactorizedLinear(
            in_digits, out_digits, bias=False, factorization="blocktt", rank=numbers / (shape[0] * shape[1])
        )

    def forward(x: Tensor) -> Any:
        with tensorly_backend():
            return layer(x)

    return forward


TRACKS.add(Track("forward", heats))
