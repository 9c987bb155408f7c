"""What every rank reduction needs of a layer: its metric, its costs, and the spec of its network at a rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tensornet_compress.calibrate import collect_statistics
from tensornet_compress.calibrate.batches import calibration_fingerprint
from tensornet_compress.calibrate.collect import Loss
from tensornet_compress.coding import FloatFormat, format_nbytes, parse_format
from tensornet_compress.errors import TensorNetError
from tensornet_compress.metric import GRADIENT_KINDS, KroneckerMetric, MetricKind, metric_kind
from tensornet_compress.nn.plan import LayerPlan, Plan
from tensornet_compress.tensor import Layout, NetworkSpec, TermSpec, Topology
from tensornet_compress.train.threshold import Cost


def float_format(name: str) -> FloatFormat:
    """A floating-point format by name.

    Raises:
        TensorNetError: an integer format, or none.
    """
    fmt = parse_format(name)
    if not isinstance(fmt, FloatFormat):
        raise TensorNetError(f"rank reduction keeps floating-point cores, was given {name!r}; use bf16, fp16 or fp32")
    return fmt


def layer_metrics(
    model: nn.Module,
    batches: Sequence[Any],
    names: Sequence[str],
    metric: str | Mapping[str, KroneckerMetric],
    loss: Loss | None,
    precision: torch.dtype | None,
) -> dict[str, KroneckerMetric]:
    """The metric of each named layer: collected by name (of inputs alone where no gradient reaches a layer), or as given.

    Raises:
        TensorNetError: an unknown metric, one without a closed-form threshold, or a layer without one.
    """
    if not isinstance(metric, str):
        missing = [name for name in names if name not in metric]
        if missing:
            raise TensorNetError(f"no metric was given for {missing[:5]}")
        return {name: metric[name] for name in names}
    kind: MetricKind = metric_kind(metric)
    if kind == "elementwise":
        raise TensorNetError("the elementwise metric has no closed-form threshold; use kronecker or row-fisher")
    if kind == "euclidean":
        return {name: KroneckerMetric() for name in names}
    gradients = kind in GRADIENT_KINDS
    statistics = collect_statistics(
        model, batches, names, {kind, "input"} if gradients else {kind}, loss=loss, precision=precision
    )
    found = {name: statistics[name].metric(kind if statistics[name].reached or not gradients else "input") for name in names}
    return {name: value for name, value in found.items() if isinstance(value, KroneckerMetric)}


def layer_cost(weight: Tensor, fmt: FloatFormat) -> Cost:
    """Bytes of a matrix (m, n) in a floating-point format: per unit of rank, and dense."""
    rows, columns = weight.shape
    return Cost(unit=format_nbytes(fmt, (rows + columns,)), dense=format_nbytes(fmt, (rows, columns)))


def rank_spec(weight: Tensor, rank: int | None, fmt: FloatFormat) -> NetworkSpec:
    """Two cores at a rank, or one core for None, that stand for ``weight``."""
    shape, dtype = tuple(weight.shape), str(weight.dtype).removeprefix("torch.")
    if rank is None:
        return NetworkSpec.dense(shape, fmt, dtype)
    topology = Topology.two_cores(len(shape), (0,))
    term = TermSpec(layout=Layout.native(shape), topology=topology, ranks=(rank,), formats=(fmt, fmt))
    return NetworkSpec.model_validate({"shape": shape, "dtype": dtype, "terms": (term,)})


def reduced_plan(layers: dict[str, LayerPlan], metric: str | Mapping[str, KroneckerMetric], batches: Sequence[Any]) -> Plan:
    """The plan of a model whose ranks were lowered: ``apply_plan`` truncates the dense weights to these ranks in the metric,
    without what the iteration trained. Metrics that cannot be made again from token batches are not part of it."""
    if not isinstance(metric, str) or metric == "euclidean" or not all(isinstance(b, Tensor | Mapping) for b in batches):
        return Plan(metric="euclidean", layers=layers)
    return Plan(calibration=calibration_fingerprint(batches), metric=metric, layers=layers)
