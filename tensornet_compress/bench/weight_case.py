"""What a weight method is given and what it gives back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from tensornet_compress.bench.registry import Registry
from tensornet_compress.bench.side import require_fit
from tensornet_compress.calibrate.layer_metrics import calibrated_metrics
from tensornet_compress.metric import KroneckerMetric, euclidean
from tensornet_compress.nn import KeptModules, Target, find_targets, layer_weight, turned
from tensornet_compress.nn.replace import set_submodule
from tensornet_compress.report import Drawing, LayerCell

SLACK = 1.04
"""Peers whose formats come in steps may take this much of the bytes asked for; our methods and those with ranks never more."""


def require_rank_one(nbytes: int, asked_nbytes: int, weights: int) -> None:
    """Refuse a factorisation whose least rank takes more than was asked for.

    Raises:
        Unavailable: see there.
    """
    asked = 8 * asked_nbytes / weights
    require_fit("rank 1", 8 * nbytes / weights, SLACK * asked, "weight", asked)


@dataclass(frozen=True)
class Approximation:
    """One layer as a peer stores it. ``matrix``: what it decodes to, (out, in); ``stored``: every tensor that it keeps, by the
    part of the ledger it belongs to; several tensors of one part are a list."""

    matrix: Tensor
    stored: dict[str, list[Tensor]]
    family: str
    formats: str
    ranks: tuple[int, ...] = ()

    @property
    def parts(self) -> dict[str, int]:
        """Stored bytes by part."""
        return {name: sum(tensor.numel() * tensor.element_size() for tensor in held) for name, held in self.stored.items()}


@dataclass(frozen=True)
class Compressed:
    """A compressed model: what every targeted layer takes, and the sum by parts. The case's model holds the result."""

    layers: tuple[LayerCell, ...]
    ledger: dict[str, int]
    note: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    drawings: tuple[Drawing, ...] = ()


@dataclass
class WeightCase:
    """A model to be compressed again and again. ``batches``: calibration ids or dicts; ``quick``: methods that have a slow
    and a fast way take the fast one and say so in their settings."""

    model: nn.Module
    batches: list[Any]
    patterns: list[str] | None = None
    quick: bool = True
    seed: int = 0
    memo: dict[Any, Any] = field(default_factory=dict)

    @cached_property
    def targets(self) -> list[Target]:
        """The layers that every method compresses."""
        return find_targets(self.model, self.patterns)[0]

    @cached_property
    def kept(self) -> KeptModules:
        """The original modules, taken while the model has them."""
        self.memo["nbytes"] = sum(p.numel() * p.element_size() for p in self.model.parameters())
        return KeptModules(self.model)

    @cached_property
    def weights(self) -> int:
        """Weights of all targets."""
        return sum(layer_weight(self.original(target)).numel() for target in self.targets)

    @cached_property
    def other_nbytes(self) -> int:
        """Bytes of everything but the targets, in the model's dtype; what is tied counts once."""
        held = {id(p): p for target in self.targets for p in self.original(target).parameters()}
        return int(self.memo["nbytes"]) - sum(p.numel() * p.element_size() for p in held.values())

    def original(self, target: Target) -> nn.Module:
        """The dense module of a target."""
        return self.kept.module(target.name)

    def matrix(self, target: Target) -> Tensor:
        """Its weight as an fp32 matrix (out, in); filters of convolutions are flattened."""
        return layer_weight(self.original(target)).float().flatten(1).contiguous()

    def bias_nbytes(self, target: Target) -> int:
        """Bytes of its bias."""
        bias: Any = getattr(self.original(target), "bias", None)
        return 0 if bias is None else bias.numel() * bias.element_size()

    def metrics(self, kind: str) -> dict[str, KroneckerMetric]:
        """The metric of every target; the last kind asked for is kept."""
        if kind == "euclidean":
            return {target.name: euclidean() for target in self.targets}
        if self.memo.get("metric kind") != kind:
            self.memo["metrics"] = None
            self.memo["metrics"] = calibrated_metrics(self.model, self.batches, self.targets, kind)
            self.memo["metric kind"] = kind
        found: dict[str, KroneckerMetric] = self.memo["metrics"]
        return found

    def put_back(self) -> None:
        """The original model again."""
        self.kept.put_back()

    def place(self, target: Target, matrix: Tensor) -> None:
        """Put a dense layer with another weight in the place of a target."""
        original: Any = self.original(target)
        stand_in: Any = object.__new__(type(original))
        nn.Module.__init__(stand_in)
        stand_in.__dict__.update({k: v for k, v in original.__dict__.items() if not k.startswith("_")})
        weight = turned(matrix.to(original.weight.dtype), target.kind).reshape(original.weight.shape)
        stand_in.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
        stand_in.register_parameter("bias", getattr(original, "bias", None))
        stand_in.train(original.training)
        for name in (target.name, *target.tied):
            set_submodule(self.model, name, stand_in)


@dataclass(frozen=True)
class WeightMethod:
    """``compress``: put compressed layers into the case's model, for bits per weight, and say what they take; raises
    ``Unavailable`` when it cannot."""

    name: str
    compress: Callable[[WeightCase, float], Compressed]
    ours: bool = False
    explanation: str = ""


WEIGHT_METHODS: Registry[WeightMethod] = Registry("weight method")

LayerPeer = Callable[[WeightCase, Target, Tensor, int], Approximation]
"""(case, target, matrix (out, in), bytes) -> approximation: a peer that works layer by layer."""


def by_layer(peer: LayerPeer, note: str = "", **settings: Any) -> Callable[[WeightCase, float], Compressed]:
    """A method that gives every layer its own peer's approximation at the same bits per weight."""

    def compress(case: WeightCase, bits: float) -> Compressed:
        cells: list[LayerCell] = []
        ledger: dict[str, int] = {}
        for target in case.targets:
            matrix = case.matrix(target)
            with torch.no_grad():
                found = peer(case, target, matrix, int(bits * matrix.numel() / 8))
                error = float((found.matrix.float() - matrix).norm() / matrix.norm().clamp_min(1e-30))
            parts = found.parts | ({"biases": case.bias_nbytes(target)} if case.bias_nbytes(target) else {})
            for name, nbytes in parts.items():
                ledger[name] = ledger.get(name, 0) + nbytes
            cells.append(
                LayerCell(
                    name=target.name,
                    kind=target.kind,
                    family=found.family,
                    formats=found.formats,
                    ranks=found.ranks,
                    bits_per_weight=8 * sum(parts.values()) / matrix.numel(),
                    nbytes=sum(parts.values()),
                    error=error,
                )
            )
            case.place(target, found.matrix)
        return Compressed(tuple(cells), ledger, note, settings)

    return compress
