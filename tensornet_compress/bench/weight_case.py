"""What a weight method is given and what it gives back."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from tensornet_compress.bench.peer_packages import require_fit
from tensornet_compress.bench.registry import Method, Registry
from tensornet_compress.calibrate.layer_metrics import calibrated_metrics
from tensornet_compress.metric import KroneckerMetric, euclidean
from tensornet_compress.nn import KeptModules, NetworkModule, Target, find_targets, layer_weight, turned
from tensornet_compress.nn.replace import set_submodule
from tensornet_compress.report import Drawing, LayerCell

Made = TypeVar("Made")
SLACK = 1.04
"""Peers whose formats come in steps may take this much of the bytes asked for; our methods and those with ranks never more."""


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
    and a fast way take the fast one and say so in their settings; ``workers``: threads of our own methods, one where their
    processor time is measured."""

    model: nn.Module
    batches: list[Any]
    patterns: list[str] | None = None
    quick: bool = True
    seed: int = 0
    workers: int = 1
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

    def metrics(self, kind: str) -> dict[str, KroneckerMetric]:
        """The metric of every target; the last kind asked for is kept."""
        if kind == "euclidean":
            return {target.name: euclidean() for target in self.targets}
        return self.latest("metrics", kind, lambda: calibrated_metrics(self.model, self.batches, self.targets, kind))

    def latest(self, what: str, kind: str, make: Callable[[], Made]) -> Made:
        """Something large, kept while the kind that is asked for stays the same."""
        if self.memo.get(what, ("",))[0] != kind:
            self.memo[what] = ("",)
            self.memo[what] = kind, make()
        made: Made = self.memo[what][1]
        return made

    def put_back(self) -> None:
        """The original model again."""
        self.kept.put_back()

    def place(self, target: Target, matrix: Tensor) -> None:
        """Put a dense layer with another weight in the place of a target."""
        original: Any = self.original(target)
        weight = turned(matrix.to(original.weight.dtype), target.kind).reshape(original.weight.shape)
        stand_in = copy.copy(original)
        stand_in._parameters = original._parameters | {"weight": nn.Parameter(weight.contiguous(), requires_grad=False)}
        for name in (target.name, *target.tied):
            set_submodule(self.model, name, stand_in)

    def read_back(self, families: str | Mapping[str, str], **told: Any) -> Compressed:
        """What the targets take, read from the model, in which they all are networks. ``families``: one for all, or by name;
        ``told``: other fields of the answer."""
        tally = Tally()
        for target in self.targets:
            module = self.model.get_submodule(target.name)
            assert isinstance(module, NetworkModule)
            original, spec = self.matrix(target), module.spec
            with torch.no_grad():
                decoded = module.dense_weight(torch.float32).reshape(original.shape)
            family = families if isinstance(families, str) else families[target.name]
            formats = "/".join(dict.fromkeys(fmt.name for term in spec.terms for fmt in term.formats))
            ranks = tuple(rank for term in spec.terms for rank in term.ranks)
            tally.add(target, original, Approximation(decoded, _parts(module), family, formats, ranks), _bias(module))
        return tally.compressed(**told)


@dataclass(frozen=True)
class Approximation:
    """One layer as it is stored. ``matrix``: what it decodes to, (out, in); ``parts``: stored bytes by part of the ledger."""

    matrix: Tensor
    parts: Mapping[str, int]
    family: str
    formats: str
    ranks: tuple[int, ...] = ()


def parts_of(**stored: Sequence[Tensor]) -> dict[str, int]:
    """Bytes of the tensors that a peer keeps, by part; an underscore in a name stands for a space."""
    sizes = {name: sum(tensor.numel() * tensor.element_size() for tensor in held) for name, held in stored.items()}
    return {name.replace("_", " "): nbytes for name, nbytes in sizes.items()}


@dataclass
class Tally:
    """The cells of a model's layers, and their bytes by part."""

    cells: list[LayerCell] = field(default_factory=list)
    ledger: Counter[str] = field(default_factory=Counter)

    def add(self, target: Target, original: Tensor, made: Approximation, bias: Counter[str]) -> None:
        """One layer; ``original``: its matrix (out, in)."""
        parts = Counter(made.parts) + bias
        self.ledger.update(parts)
        self.cells.append(
            LayerCell(
                name=target.name,
                kind=target.kind,
                family=made.family,
                formats=made.formats,
                ranks=made.ranks,
                bits_per_weight=8 * parts.total() / original.numel(),
                nbytes=parts.total(),
                error=float((made.matrix.float() - original).norm() / original.norm().clamp_min(1e-30)),
            )
        )

    def compressed(self, **told: Any) -> Compressed:
        """The answer of a method."""
        return Compressed(tuple(self.cells), dict(self.ledger), **told)


def _parts(module: NetworkModule) -> dict[str, int]:
    """Stored bytes of a layer by part."""
    network = module.network()
    codes, numbers = ("codes", "dense numbers") if network.spec.is_dense else ("factor codes", "factors")
    named = {"scale": "scales", "zero": "zero points", "q": codes, "coded": codes}
    parts: Counter[str] = Counter()
    for name, tensor in network.stored.items():
        parts[named.get(name.rpartition("_")[2], numbers)] += tensor.nbytes
    if network.nbytes > parts.total():
        parts["orders"] = network.nbytes - parts.total()
    return parts


def _bias(module: nn.Module) -> Counter[str]:
    bias: Any = getattr(module, "bias", None)
    return Counter() if bias is None else Counter(biases=bias.numel() * bias.element_size())


WEIGHT_METHODS: Registry[Method[WeightCase, Compressed]] = Registry("weight method")


LayerPeer = Callable[[WeightCase, Target, Tensor, int], Approximation]
"""(case, target, matrix (out, in), bytes) -> approximation: a peer that works layer by layer."""


def by_layer(peer: LayerPeer, note: str = "", **settings: Any) -> Callable[[WeightCase, float], Compressed]:
    """A method that gives every layer its own peer's approximation at the same bits per weight."""

    def compress(case: WeightCase, bits: float) -> Compressed:
        tally = Tally()
        for target in case.targets:
            matrix = case.matrix(target)
            with torch.no_grad():
                made = peer(case, target, matrix, int(bits * matrix.numel() / 8))
                tally.add(target, matrix, made, _bias(case.original(target)))
            case.place(target, made.matrix)
        return tally.compressed(note=note, settings=settings)

    return compress


def require_rank_one(nbytes: int, asked_nbytes: int, weights: int) -> None:
    """Raises ``Unavailable`` for a factorisation whose least rank takes more than was asked for."""
    asked = 8 * asked_nbytes / weights
    require_fit("rank 1", 8 * nbytes / weights, SLACK * asked, "weight", asked)
