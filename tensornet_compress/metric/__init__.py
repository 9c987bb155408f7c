"""Metrics in which truncation error is measured, and the streaming statistics they need."""

from tensornet_compress.metric.metric import KroneckerMetric, Metric, euclidean, input_second_moment
from tensornet_compress.metric.moments import Batch, InputMoment, collect_input_moments, has_input_moment, model_inputs

__all__ = [
    "Batch",
    "InputMoment",
    "KroneckerMetric",
    "Metric",
    "collect_input_moments",
    "euclidean",
    "has_input_moment",
    "input_second_moment",
    "model_inputs",
]
