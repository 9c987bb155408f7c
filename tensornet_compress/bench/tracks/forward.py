"""Forward of one layer: our two-core module beside two matrices by hand, the dense layer and tensorly-torch's TT-matrix."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tensornet_compress as tnc
from tensornet_compress.bench.peer_packages import SIDE, Unavailable
from tensornet_compress.bench.peers.tensor_formats import digits
from tensornet_compress.bench.speed_case import OURS, TRACKS, Heat, Raced, SpeedSettings, Track, race
from tensornet_compress.coding import parse_format
from tensornet_compress.decompose.tensorly_adapter import tensorly_backend

SHAPES = ((576, 576), (192, 576), (576, 1536), (1536, 576))
COMPILED = (OURS, "by-hand", "dense")
NAMES = (OURS, "ours-int8", "ours-int4-dense", "by-hand", "dense", "tltorch-ttm")


class ByHand(nn.Module):
    """The module that one would write by hand: two matrices, two matmuls."""

    def __init__(self, left: Tensor, right: Tensor):
        super().__init__()
        self.left, self.right = nn.Parameter(left.clone()), nn.Parameter(right.clone())

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        return F.linear(F.linear(x, self.right), self.left)


def heats(settings: SpeedSettings) -> Iterator[Heat]:
    """Each shape at each batch size; in full runs also compiled."""
    names = NAMES if settings.quick else (*NAMES, *(f"{name}-compiled" for name in COMPILED))
    for rows, columns in SHAPES[-1:] if settings.quick else SHAPES:
        for batch in settings.batches:
            subject = f"forward of {rows} x {columns}, batch {batch}"
            yield Heat(subject, names, partial(_forward, settings, (rows, columns), batch))


def _forward(settings: SpeedSettings, shape: tuple[int, int], batch: int) -> Raced:
    torch.manual_seed(settings.seed)
    out_features, in_features = shape
    numbers = settings.keep * out_features * in_features
    rank = int(numbers / (out_features + in_features))
    dense = nn.Linear(in_features, out_features, bias=False)
    weight = dense.weight.detach()
    cut = tnc.Topology.two_cores(2, (0,))
    network = tnc.to_network(weight, cut, ranks=rank)
    integers = tnc.to_network(weight, cut, ranks=rank, fmt=parse_format("int8g64"))
    whole = tnc.to_network(weight, tnc.Topology.one_core(2), ranks=1, fmt=parse_format("int4g64o"))
    modules: dict[str, Callable[[Tensor], Any]] = {
        OURS: tnc.TNLinear.from_linear(dense, network),
        "ours-int8": tnc.TNLinear.from_linear(dense, integers),
        "ours-int4-dense": tnc.TNLinear.from_linear(dense, whole),
        "by-hand": ByHand(*network.cores()),
        "dense": dense,
    }
    missing = {}
    try:
        modules["tltorch-ttm"] = _tltorch(shape, int(numbers))
    except Unavailable as reason:
        missing["tltorch-ttm"] = str(reason)
    x = torch.randn(batch, in_features)
    if not settings.quick:
        torch.compiler.reset()
        for name in COMPILED:
            try:
                compiled: Any = torch.compile(modules[name], fullgraph=True)
                with torch.no_grad():
                    compiled(x)
                modules[f"{name}-compiled"] = compiled
            except Exception as error:  # Compilers are outside of torch, and fail in their own ways.
                missing[f"{name}-compiled"] = f"{type(error).__name__}: {error}"
    seconds = race({name: partial(module, x) for name, module in modules.items()}, settings.rounds)
    values = {name: {"time": time} for name, time in seconds.items()}
    return Raced(values, missing, {"rank": rank, "keep": settings.keep})


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
