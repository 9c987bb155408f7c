"""The metric of every targeted layer, calibrated by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn

from tensornet_compress.compression.moments import input_moments
from tensornet_compress.errors import TensorNetError
from tensornet_compress.metric import (
    GRADIENT_KINDS,
    Batch,
    KroneckerMetric,
    collect_statistics,
    has_input_moment,
    input_second_moment,
    metric_kind,
)
from tensornet_compress.nn import Target


def calibrated_metrics(
    model: nn.Module, batches: Sequence[Batch], chosen: Sequence[Target], kind: str, advance: Callable[[], None] = lambda: None
) -> dict[str, KroneckerMetric]:
    """Metrics by target, for layers that have one: none for ``euclidean`` or without batches.

    Layers without input vectors of their own (embeddings) take the input metric of the head tied to them, and layers that no
    gradient reaches (a pooler beside the output) their input metric, whatever ``kind``.

    Raises:
        TensorNetError: an unknown metric, or the elementwise one, which has no closed-form truncation.
    """
    if metric_kind(kind) == "elementwise":
        raise TensorNetError("the elementwise metric has no closed-form truncation; choose kronecker or row-fisher")
    if kind == "euclidean" or not batches:
        return {}
    own = [target for target in chosen if has_input_moment(model.get_submodule(target.name))]
    others = [target for target in chosen if target not in own]
    if kind == "input":
        own, others = [], list(chosen)
    metrics: dict[str, KroneckerMetric] = {}
    if own:
        names = [target.name for target in own]
        for name, statistics in collect_statistics(model, batches, names, {kind, "input"}, advance=advance).items():
            usable = statistics.reached or kind not in GRADIENT_KINDS
            metric = statistics.metric(metric_kind(kind) if usable else "input")
            assert isinstance(metric, KroneckerMetric)
            metrics[name] = metric
    if others:
        silent = advance if not own else lambda: None
        moments = input_moments(model, batches, others, silent)
        # Layers that share their input share the metric too, and the memory that it takes.
        shared = {id(moment): input_second_moment(moment) for moment in moments.values()}
        metrics |= {name: shared[id(moment)] for name, moment in moments.items()}
    return metrics
