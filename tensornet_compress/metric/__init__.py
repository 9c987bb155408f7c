"""Inner products in which the error of a tensor is measured."""

from tensornet_compress.metric.kinds import GRADIENT_KINDS, METRIC_KINDS, MetricKind, metric_kind
from tensornet_compress.metric.metric import (
    ElementwiseMetric,
    KroneckerMetric,
    Metric,
    StoredMetric,
    euclidean,
    input_second_moment,
    loaded,
    loaded_in_turn,
    squared_norm,
)

__all__ = [
    "GRADIENT_KINDS",
    "METRIC_KINDS",
    "ElementwiseMetric",
    "KroneckerMetric",
    "Metric",
    "MetricKind",
    "StoredMetric",
    "euclidean",
    "input_second_moment",
    "loaded",
    "loaded_in_turn",
    "metric_kind",
    "squared_norm",
]
