"""How far the layers of a compressed model lie from the dense weights that they stand for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import nn

from tensornet_compress.calibrate import Batch
from tensornet_compress.calibrate.layer_metrics import calibrated_metrics, stored_metrics
from tensornet_compress.metric import KroneckerMetric, StoredMetric, euclidean
from tensornet_compress.nn import KeptModules, NetworkModule, Target, layer_weight


def layer_errors(
    model: nn.Module,
    original: KeptModules,
    targets: Sequence[Target],
    batches: Sequence[Batch],
    metric: str,
    by_block: bool = False,
) -> dict[str, float]:
    """Squared error of each target in its metric, relative to the squared norm of the dense weight, by name.

    Args:
        model: compressed; every target is a network module. It is dense while the metrics are calibrated, and then again what
            it was.
        original: the dense modules of ``model``.
        metric, by_block: as for ``compress``; with the same ``batches`` the metrics are those that it compressed in.
    """
    compressed = KeptModules(model)
    with TemporaryDirectory(prefix="tensornet-metrics-") as folder:
        metrics: Mapping[str, KroneckerMetric | StoredMetric]
        try:
            original.put_back()
            if by_block:
                metrics = stored_metrics(model, batches, targets, metric, Path(folder))
            else:
                metrics = calibrated_metrics(model, batches, targets, metric)
        finally:
            compressed.put_back()
        return {
            target.name: _relative_error(original.module(target.name), compressed.module(target.name), metrics.get(target.name))
            for target in targets
        }


def _relative_error(dense: nn.Module, network: nn.Module, metric: KroneckerMetric | StoredMetric | None) -> float:
    assert isinstance(network, NetworkModule)
    inner = metric.load() if isinstance(metric, StoredMetric) else metric or euclidean()
    weight = layer_weight(dense).float()
    matrix = weight.reshape(len(weight), -1)
    change = matrix - network.network().to_dense(torch.float32).reshape(matrix.shape)
    inner = inner.to(matrix.device)
    return inner.norm2(change) / max(inner.norm2(matrix), 1e-300)
