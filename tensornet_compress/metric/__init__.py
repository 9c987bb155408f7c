"""Inner products in which the error of a tensor is measured."""

from tensornet_compress.metric.elementwise import ElementwiseMetric
from tensornet_compress.metric.kinds import GRADIENT_KINDS, METRIC_KINDS, MetricKind, metric_kind
from tensornet_compress.metric.metric import KroneckerMetric, Metric, euclidean, input_second_moment, squared_norm
from tensornet_compress.metric.stored import StoredMetric

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
    "metric_kind",
    "squared_norm",
]
