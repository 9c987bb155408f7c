"""Metrics in which truncation error is measured, and the streaming statistics they need."""

from tensornet_compress.metric.by_blocks import block_passes, statistics_by_block
from tensornet_compress.metric.collect import collect_statistics
from tensornet_compress.metric.elementwise import ElementwiseMetric
from tensornet_compress.metric.kinds import GRADIENT_KINDS, METRIC_KINDS, MetricKind, metric_kind
from tensornet_compress.metric.metric import KroneckerMetric, Metric, euclidean, input_second_moment, squared_norm
from tensornet_compress.metric.moments import (
    Batch,
    InputMoment,
    collect_input_moments,
    has_input_moment,
    model_inputs,
    require_unchanged,
    version_of,
    weight_users,
)
from tensornet_compress.metric.outputs import graph_start, kept_output, sampled_loss
from tensornet_compress.metric.statistics import GradientStatistics
from tensornet_compress.metric.stored import StoredMetric

__all__ = [
    "GRADIENT_KINDS",
    "METRIC_KINDS",
    "Batch",
    "ElementwiseMetric",
    "GradientStatistics",
    "InputMoment",
    "KroneckerMetric",
    "Metric",
    "MetricKind",
    "StoredMetric",
    "block_passes",
    "collect_input_moments",
    "collect_statistics",
    "euclidean",
    "graph_start",
    "has_input_moment",
    "input_second_moment",
    "kept_output",
    "metric_kind",
    "model_inputs",
    "require_unchanged",
    "sampled_loss",
    "squared_norm",
    "statistics_by_block",
    "version_of",
    "weight_users",
]
