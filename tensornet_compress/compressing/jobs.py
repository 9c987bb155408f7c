"""Jobs on layers that are fed the same inputs: tell what each may become, and make what was chosen. Independent of each other,
so that they run on any number of threads, processes or machines."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Literal, get_args

import torch
from safetensors import safe_open
from torch import Tensor

from tensornet_compress.coding import CodedFormat
from tensornet_compress.coding.trellis import STATES
from tensornet_compress.decompose import fit_network
from tensornet_compress.decompose.matrix import squared_singular_values
from tensornet_compress.decompose.one_step import Canceller, is_coded, row_weights
from tensornet_compress.memory import release
from tensornet_compress.metric import KroneckerMetric, StoredMetric, euclidean, loaded, loaded_in_turn
from tensornet_compress.nn import turned
from tensornet_compress.options import Family, LayerStatistics, Option, layer_options
from tensornet_compress.tensor import Layout, NetworkSpec, TensorNetwork, TermSpec, Topology
from tensornet_compress.threads import leave_if_stopped

Method = Literal["auto", "coded", "dense", "svd", "residual", "tt", "ttm", "tree", "searched", "sorted"]
Effort = Literal["fast", "default", "max"]
EFFORTS: tuple[Effort, ...] = get_args(Effort)
_SAMPLED_ROWS = 24
_SAMPLED_SHARE = 16
# Numbers of errors that are weighed at once.
_TOGETHER = 1 << 21
# Stepped integers compete where what a coded matrix takes beside its codes weighs.
_SMALL = 1 << 13
# What a coded matrix takes beside its codes, steps and foretold magnitudes.
SIDE_BITS = 1000


@dataclass(frozen=True)
class WeightSource:
    """A weight in memory, or a tensor of a safetensors file that the job reads itself, as a module of ``kind`` keeps it, in the
    dtype of the loaded model."""

    numel: int
    tensor: Tensor | None = None
    file: Path | None = None
    key: str = ""
    kind: str = "linear"
    dtype: torch.dtype | None = None

    def load(self) -> Tensor:
        """The weight, outputs first."""
        if self.tensor is not None:
            return self.tensor
        with safe_open(str(self.file), framework="pt") as file:
            tensor: Tensor = file.get_tensor(self.key).to(self.dtype)
        return turned(tensor, self.kind).contiguous()


@dataclass(frozen=True)
class Layer:
    """One layer: its weight, the metric of its errors (None: Euclidean), and what a unit of squared error in it costs, in nats
    per token (None: errors count relative to the weight's own squared norm)."""

    name: str
    source: WeightSource
    metric: KroneckerMetric | StoredMetric | None = None
    price: float | None = None
    layout: tuple[Layout, Topology] | None = None

    def loaded_metric(self) -> KroneckerMetric:
        """The layer's metric, Euclidean where none was calibrated."""
        return loaded(self.metric) or euclidean()


@dataclass(frozen=True)
class Offer:
    """What layers may become: families of networks with their number formats and sizes, entropy-coded integers (``coded``) and
    two cores of those (``coded_cores``), foretold at these ``steps`` (of a metric in nats)."""

    families: tuple[Family, ...] = ()
    formats: tuple[str, ...] | None = None
    shares: tuple[float, ...] = ()
    coded: bool = False
    coded_cores: bool = False
    steps: tuple[float, ...] = ()


@dataclass(frozen=True)
class Job:
    """Layers that were fed the same inputs (they share the column factor of their metrics)."""

    layers: tuple[Layer, ...]
    sweeps: int = 1


@dataclass(frozen=True)
class Surveyed:
    """What a layer may become.

    ``energy``: its squared norm in the metric; ``price``: what a unit of that costs; ``unit``: the step in the metric that
    stands for a step of one in nats. ``options``: networks in stepped formats; ``coded``: bits and squared error at each of the
    offered steps; ``squares``: squared singular values in the metric, where two entropy-coded cores are offered.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    energy: float
    price: float
    unit: float
    options: list[Option] = field(default_factory=list)
    coded: list[tuple[float, float]] = field(default_factory=list)
    squares: Tensor | None = None

    def coded_spec(self, step: float, rank: int | None = None) -> NetworkSpec:
        """Entropy-coded integers of a step (in nats), as one core or as two of a rank."""
        layout, fmt = Layout.native(self.shape), CodedFormat(step=step * self.unit, states=STATES)
        axes = len(self.shape)
        topology = Topology.one_core(axes) if rank is None else Topology.two_cores(axes, (0,))
        ranks, formats = ((), (fmt,)) if rank is None else ((rank,), (fmt, fmt))
        return NetworkSpec.of(TermSpec(layout=layout, topology=topology, ranks=ranks, formats=formats), self.dtype)


@dataclass(frozen=True)
class Made:
    """A layer's network, and the squared error in the metric that it was measured to have."""

    name: str
    network: TensorNetwork
    error: float


class _Bench:
    """A job at work: the factors that its layers share are computed once."""

    def __init__(self, job: Job):
        self.job = job
        self._columns: Tensor | None = None

    @cached_property
    def canceller(self) -> Canceller:
        return Canceller.of(self._columns, self.job.layers[0].source.load()[0].numel())

    def layers(self) -> Iterator[tuple[Layer, Tensor, Tensor, KroneckerMetric]]:
        """Each with its weight, that as a matrix in single precision, and its metric."""
        for layer, metric in zip(self.job.layers, loaded_in_turn(layer.metric for layer in self.job.layers)):
            leave_if_stopped()
            weight, self._columns = layer.source.load(), metric.columns
            yield layer, weight, weight.reshape(len(weight), -1).float(), metric


def survey_job(task: tuple[Job, Offer]) -> list[Surveyed]:
    """What each layer of a job may become."""
    job, offer = task
    bench, found = _Bench(job), []
    for layer, weight, matrix, metric in bench.layers():
        cores = offer.coded_cores and min(matrix.shape) > 1
        squares = squared_singular_values(matrix, metric) if cores else None
        energy = metric.norm2(matrix) if squares is None else float(squares.sum())
        price = 1 / max(energy, 1e-300) if layer.price is None else layer.price
        unit = ((1.0 if metric.rate is None else metric.rate) / price) ** 0.5
        surveyed = Surveyed(layer.name, tuple(weight.shape), weight.dtype, energy, price, unit, squares=squares)
        families: tuple[Family, ...] = offer.families
        if offer.coded_cores and weight.numel() <= _SMALL:
            families = ("dense", *families)
        if families:
            statistics = LayerStatistics(weight, metric)
            options = layer_options(statistics, families, offer.formats, offer.shares, layer.layout)
            surveyed = replace(surveyed, options=options)
        if offer.coded:
            surveyed = replace(
                surveyed, coded=_foretold(bench.canceller, matrix, metric, [step * unit for step in offer.steps])
            )
        found.append(surveyed)
    return found


def _foretold(
    canceller: Canceller, matrix: Tensor, metric: KroneckerMetric, steps: Sequence[float]
) -> list[tuple[float, float]]:
    """Bits and squared error in the metric at each step, from a sample of the rows."""
    stride = max(1, min(len(matrix) // _SAMPLED_ROWS, _SAMPLED_SHARE))
    rows = slice(stride // 2, None, stride)
    sample, weights = matrix[rows], row_weights(metric, len(matrix))[rows]
    scale = len(matrix) / len(sample)
    # Steps and foretold magnitudes of rows and columns take about a byte each.
    side = 8.0 * sum(matrix.shape) + SIDE_BITS
    level = 2.0 if metric.rate is None else 2 * metric.rate
    found = []
    for step in steps:
        coded, losses = canceller.codes_and_losses(sample, weights, step, states=STATES)
        found.append((side + scale * coded.bits, scale * float(losses @ weights) / level))
    return found


def make_job(task: tuple[Job, Sequence[NetworkSpec]]) -> list[Made]:
    """The networks that specs, one for each layer, ask for, and their measured errors."""
    job, specs = task
    bench, made = _Bench(job), []
    for (layer, weight, matrix, metric), spec in zip(bench.layers(), specs):
        network = fit_network(weight, spec, metric, job.sweeps, bench.canceller if is_coded(spec) else None)
        dense = network.to_dense(torch.float32).reshape(matrix.shape)
        # What coded integers decode to belongs to nobody else.
        lost = dense if is_coded(spec) else torch.empty_like(dense)
        together = max(1, _TOGETHER // max(1, matrix.shape[1]))
        for part, decoded, place in zip(*(whole.split(together) for whole in (matrix, dense, lost))):
            torch.sub(part, decoded, out=place)
            release(part)
        made.append(Made(layer.name, network, metric.norm2(lost)))
    return made
