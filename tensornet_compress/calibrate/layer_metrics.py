"""The metric of every targeted layer, calibrated by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from torch import nn

from tensornet_compress.calibrate.by_blocks import block_passes, statistics_by_block
from tensornet_compress.calibrate.collect import collect_statistics
from tensornet_compress.calibrate.input_moments import input_moments
from tensornet_compress.calibrate.moments import Batch, has_input_moment
from tensornet_compress.calibrate.statistics import GradientStatistics
from tensornet_compress.errors import TensorNetError
from tensornet_compress.metric import (
    GRADIENT_KINDS,
    KroneckerMetric,
    MetricKind,
    StoredMetric,
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
    wanted = _closed_form(kind)
    if wanted == "euclidean" or not batches:
        return {}
    own, others = _with_and_without_inputs(model, chosen)
    if wanted == "input":
        own, others = [], list(chosen)
    metrics: dict[str, KroneckerMetric] = {}
    if own:
        names = [target.name for target in own]
        collected = collect_statistics(model, batches, names, {wanted, "input"}, tied=_tied(own), advance=advance)
        metrics = {name: _metric(statistics, wanted) for name, statistics in collected.items()}
    if others:
        metrics |= _input_metrics(model, batches, others, advance if not own else lambda: None)
    return metrics


def stored_metrics(
    model: nn.Module,
    batches: Sequence[Batch],
    chosen: Sequence[Target],
    kind: str,
    folder: Path,
    advance: Callable[[], None] = lambda: None,
) -> dict[str, StoredMetric]:
    """``calibrated_metrics`` collected block by block and written to ``folder``: memory holds those of one block at a time.

    ``advance`` is called ``calibration_passes`` times as often as there are batches. Raises as ``calibrated_metrics``.
    """
    wanted = _closed_form(kind)
    if wanted == "euclidean" or not batches:
        return {}
    own, others = _with_and_without_inputs(model, chosen)
    stored: dict[str, StoredMetric] = {}

    def store(name: str, metric: KroneckerMetric) -> None:
        stored[name] = StoredMetric.write(metric, folder / f"{len(stored)}.safetensors")

    if own:
        names = [target.name for target in own]
        for part in statistics_by_block(model, batches, names, {wanted, "input"}, tied=_tied(own), advance=advance):
            for name in list(part):
                store(name, _metric(part.pop(name), wanted))
    if others:
        for name, metric in _input_metrics(model, batches, others, lambda: None).items():
            store(name, metric)
    return stored


def calibration_passes(model: nn.Module, chosen: Sequence[Target]) -> int:
    """Passes over the batches that ``stored_metrics`` reports to ``advance``."""
    return block_passes(model, [target.name for target in _with_and_without_inputs(model, chosen)[0]])


def _closed_form(kind: str) -> MetricKind:
    found = metric_kind(kind)
    if found == "elementwise":
        raise TensorNetError("the elementwise metric has no closed-form truncation; choose kronecker or row-fisher")
    return found


def _with_and_without_inputs(model: nn.Module, chosen: Sequence[Target]) -> tuple[list[Target], list[Target]]:
    own = [target for target in chosen if has_input_moment(model.get_submodule(target.name))]
    return own, [target for target in chosen if target not in own]


def _tied(chosen: Sequence[Target]) -> dict[str, tuple[str, ...]]:
    return {target.name: target.tied for target in chosen}


def _metric(statistics: GradientStatistics, kind: MetricKind) -> KroneckerMetric:
    usable = statistics.reached or kind not in GRADIENT_KINDS
    metric = statistics.metric(kind if usable else "input")
    assert isinstance(metric, KroneckerMetric)
    # Layers are compressed on the processor, wherever the model is.
    return metric.to("cpu")


def _input_metrics(
    model: nn.Module, batches: Sequence[Batch], chosen: Sequence[Target], advance: Callable[[], None]
) -> dict[str, KroneckerMetric]:
    moments = input_moments(model, batches, chosen, advance)
    # Layers that share their input share the metric too, and the memory that it takes.
    shared = {id(moment): input_second_moment(moment) for moment in moments.values()}
    return {name: shared[id(moment)] for name, moment in moments.items()}
