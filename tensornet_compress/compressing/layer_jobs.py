"""Per-layer jobs: survey what a layer may become, and realise what was chosen for it. Independent of each other, so that they
run on any number of processes or machines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from tensornet_compress.coding import IntFormat, parse_format
from tensornet_compress.decompose import fit_network, realise
from tensornet_compress.metric import KroneckerMetric, StoredMetric, euclidean
from tensornet_compress.nn import turned
from tensornet_compress.options import Family, LayerStatistics, Option, layer_options
from tensornet_compress.tensor import Layout, NetworkSpec, TensorNetwork, Topology

_PROBE_ERROR = 0.1


@dataclass(frozen=True)
class WeightSource:
    """A weight in memory, or a tensor of a safetensors file that the job reads itself, as a module of ``kind`` keeps it, in the
    dtype of the loaded model."""

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
class LayerJob:
    """What a process needs to work on one layer."""

    name: str
    source: WeightSource
    metric: KroneckerMetric | StoredMetric | None
    families: tuple[Family, ...] = ("dense",)
    formats: tuple[str, ...] | None = None
    shares: tuple[float, ...] = ()
    sweeps: int = 1
    layout: tuple[Layout, Topology] | None = None

    def loaded_metric(self) -> KroneckerMetric:
        """The layer's metric, Euclidean where none was calibrated."""
        metric = self.metric or euclidean()
        return metric.load() if isinstance(metric, StoredMetric) else metric

    def statistics(self) -> LayerStatistics:
        """Weight and metric, ready for predictions."""
        return LayerStatistics(self.source.load(), self.loaded_metric())


@dataclass(frozen=True)
class Survey:
    """Options of a layer, its squared norm in the metric, and one compressed form to measure its sensitivity with."""

    name: str
    options: list[Option]
    energy: float
    probe: TensorNetwork
    probe_error: float


@dataclass(frozen=True)
class Realised:
    """A layer's network and the squared error in the metric that it was measured to have."""

    name: str
    network: TensorNetwork
    error: float


def survey_layer(job: LayerJob) -> Survey:
    """All options of a layer with predicted errors, and a probe."""
    statistics = job.statistics()
    options = layer_options(statistics, job.families, job.formats, job.shares, job.layout)
    probe = _probe(statistics, job.families, job.formats)
    return Survey(job.name, options, statistics.energy, probe, measured_error(statistics, probe))


def _probe(statistics: LayerStatistics, families: Sequence[Family], formats: Sequence[str] | None) -> TensorNetwork:
    """Three-bit integers where integers may be chosen, else two bf16 cores that lose about a tenth of the energy."""
    shape = tuple(statistics.weight.shape)
    chosen = [parse_format(name) for name in formats or ("int4g64z",)]
    if "dense" in families and any(isinstance(fmt, IntFormat) for fmt in chosen):
        return statistics.rounded(parse_format("int3g64z"))
    spectrum = statistics.spectrum
    dropped = 1 - spectrum.squares.cumsum(0) / spectrum.squares.sum().clamp_min(1e-300)
    rank = max(1, min(int((dropped > _PROBE_ERROR).sum()) + 1, len(spectrum.squares) - 1))
    bf16 = parse_format("bf16")
    spec = statistics.spec(Layout.native(shape), Topology.two_cores(len(shape), (0,)), (rank,), (bf16, bf16))
    return realise(statistics.weight, spec, statistics.metric, feedback=statistics.feedback)


def measured_error(statistics: LayerStatistics, network: TensorNetwork) -> float:
    """Squared error of a network in the metric."""
    dense = network.to_dense(torch.float32).reshape(statistics.matrix.shape)
    return statistics.metric.norm2(statistics.matrix - dense)


def realise_layer(task: tuple[LayerJob, NetworkSpec]) -> Realised:
    """The network that a spec asks for, and its measured error."""
    job, spec = task
    statistics = job.statistics()
    network = fit_network(statistics.weight, spec, statistics.metric, sweeps=job.sweeps)
    return Realised(job.name, network, measured_error(statistics, network))
