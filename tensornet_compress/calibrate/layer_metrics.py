"""The metric of every targeted layer, calibrated by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from tensornet_compress.calibrate.by_blocks import block_passes, statistics_by_block
from tensornet_compress.calibrate.collect import collect_statistics
from tensornet_compress.calibrate.fisher_metrics import fisher_metrics, metric_level
from tensornet_compress.calibrate.hooks import has_input_vectors, weight_users
from tensornet_compress.calibrate.lending import lent
from tensornet_compress.calibrate.shared_sweeps import swept
from tensornet_compress.calibrate.statistics import InputMoment
from tensornet_compress.calibrate.sweeps import FisherSweeps, NotByBlocksError, sweep_steps
from tensornet_compress.errors import TensorNetError
from tensornet_compress.files.steps import Steps
from tensornet_compress.metric import (
    GRADIENT_KINDS,
    METRIC_KINDS,
    KroneckerMetric,
    MetricKind,
    StoredMetric,
    loaded_in_turn,
    metric_kind,
)
from tensornet_compress.nn import Target

LAYER_METRICS = ("fisher", *METRIC_KINDS)
_MIDDLING = "its errors are Euclidean, and count like those of a layer of middling weight"


def check_metric(name: str) -> None:
    """Raises ``TensorNetError`` unless a metric of layers has this name."""
    if name not in LAYER_METRICS:
        raise TensorNetError(f"unknown metric {name!r}; choose one of {', '.join(LAYER_METRICS)}")


def calibrated_metrics(
    model: nn.Module,
    batches: Sequence[Any],
    chosen: Sequence[Target],
    kind: str,
    advance: Callable[[], None] = lambda: None,
    notes: dict[str, str] | None = None,
    device: torch.device | None = None,
    **options: Any,
) -> dict[str, KroneckerMetric]:
    """Metrics by target, for layers that have one: none for ``euclidean`` or without batches.

    Layers without input vectors of their own (embeddings) take the input metric of the head tied to them, and layers that no
    gradient reaches (a pooler beside the output) their input metric, whatever ``kind``; layers that are never called (experts
    that no token chose) or given zeros alone have none, except under ``fisher``, where they count like a layer of middling
    weight. ``notes`` takes what a reader should know of single layers. ``device``: where passes run, None where the model is.
    ``options`` go to ``collect_statistics`` (or ``fisher_metrics``).

    Raises:
        TensorNetError: an unknown metric, the elementwise one, which has no closed-form truncation, or batches that reach no
            target.
    """
    notes = {} if notes is None else notes
    metrics = _metrics(model, batches, chosen, kind, None, notes, device, {"advance": advance} | options)
    return dict(metrics)  # type: ignore[arg-type]


def stored_metrics(
    model: nn.Module,
    batches: Sequence[Any],
    chosen: Sequence[Target],
    kind: str,
    steps: Steps,
    by_block: bool = True,
    advance: Callable[[], None] = lambda: None,
    notes: dict[str, str] | None = None,
    device: torch.device | None = None,
) -> dict[str, StoredMetric]:
    """``calibrated_metrics`` written to the folder of ``steps``; with ``by_block`` memory holds those of one block at a time.

    ``advance`` is called ``calibration_steps`` times. Where the Fisher metrics of a model cannot be had by blocks, they are
    collected at once, and the note of that is filed under the empty name. Raises as ``calibrated_metrics``.
    """
    known = steps.found("metrics")
    if known is None:
        told: dict[str, str] = {}
        metrics = _metrics(model, batches, chosen, kind, steps if by_block else None, told, device, {"advance": advance})
        found = StoredMetric.write_all(metrics, steps.folder)
        known = {"metrics": {name: metric.to_json() for name, metric in found.items()}, "notes": told}
        steps.finish("metrics", known, [file for metric in found.values() for file in metric.files])
    if notes is not None:
        notes |= known["notes"]
    return {name: StoredMetric.from_json(steps.folder, *told) for name, told in known["metrics"].items()}


def calibration_steps(model: nn.Module, batches: int, chosen: Sequence[Target], kind: str) -> int:
    """How often ``stored_metrics`` calls ``advance`` for so many batches, by blocks."""
    modules = {target.name: model.get_submodule(target.name) for target in chosen}
    if kind == "fisher":
        return sweep_steps(model, batches, list(modules))
    return batches * block_passes(model, [name for name, module in modules.items() if has_input_vectors(module)])


def _metrics(
    model: nn.Module,
    batches: Sequence[Any],
    chosen: Sequence[Target],
    kind: str,
    steps: Steps | None,
    notes: dict[str, str],
    device: torch.device | None,
    options: dict[str, Any],
) -> Iterator[tuple[str, KroneckerMetric | StoredMetric]]:
    """Names and metrics as they become known; by blocks if there are ``steps`` for what these need."""
    check_metric(kind)
    unseen = {target.name: f"calibration never reached it: {_MIDDLING}" for target in chosen} if batches else {}
    if kind == "fisher":
        metrics = _fisher(model, batches, chosen, steps, notes, device, options)
    else:
        metrics = _on(device, model, _collected_metrics(model, batches, chosen, kind, steps is not None, options))
    for name, metric in metrics:
        if isinstance(metric, StoredMetric) or metric.columns is not None or metric.rows is not None:
            unseen.pop(name)
        yield name, metric
    notes |= unseen if kind != "euclidean" else {}


def _fisher(
    model: nn.Module,
    batches: Sequence[Any],
    chosen: Sequence[Target],
    steps: Steps | None,
    notes: dict[str, str],
    device: torch.device | None,
    options: dict[str, Any],
) -> Iterator[tuple[str, KroneckerMetric | StoredMetric]]:
    """Layers that were never reached come last, and count like a middling one."""
    named = {target.name: target for target in chosen}
    reached = []
    for name, metric in _reached(model, batches, chosen, steps, notes, device, options) if batches else ():
        reached.append(metric)
        named.pop(name)
        yield name, metric
    if batches and not reached:
        raise TensorNetError(
            f"no targeted layer reaches the loss of {type(model).__name__}: no gradient comes back to any of them, as where "
            "all weights are zero; look at the model's weights, or choose other targets"
        )
    if batches and named:
        levels = [metric_level(metric) for metric in loaded_in_turn(reached)]
        middling = KroneckerMetric(rate=0.5 * sorted(levels)[len(levels) // 2])
        yield from dict.fromkeys(named, middling).items()


def _reached(
    model: nn.Module,
    batches: Sequence[Any],
    chosen: Sequence[Target],
    steps: Steps | None,
    notes: dict[str, str],
    device: torch.device | None,
    options: dict[str, Any],
) -> Iterator[tuple[str, KroneckerMetric | StoredMetric]]:
    if steps is not None:
        try:
            sweeps = FisherSweeps(model, batches, chosen, steps, device=device, **options)
        except NotByBlocksError as error:
            notes[""] = f"statistics were collected in one pass over the whole model, which takes more memory: {error}"
        else:
            yield from swept(sweeps)
            return
    try:
        with lent(model.modules(), device):
            found = fisher_metrics(model, batches, chosen, **options)
    except RuntimeError as error:
        raise TensorNetError(
            f"a forward and backward pass of {type(model).__name__} failed ({error}); metric='input' with allocator='energy' "
            "needs no gradients"
        ) from error
    yield from found.items()


def _on(device: torch.device | None, model: nn.Module, metrics: Iterator[Any]) -> Iterator[Any]:
    """The same, made while the whole model lies on a device."""
    with lent(model.modules(), device):
        yield from metrics


def _collected_metrics(
    model: nn.Module, batches: Sequence[Any], chosen: Sequence[Target], kind: str, by_block: bool, options: dict[str, Any]
) -> Iterator[tuple[str, KroneckerMetric]]:
    wanted = metric_kind(kind)
    if wanted == "elementwise":
        raise TensorNetError("the elementwise metric has no closed-form truncation; choose kronecker or row-fisher")
    if wanted == "euclidean" or not batches:
        return
    tied = {target.name: target.tied for target in chosen}
    usable = [name for name, others in tied.items() if weight_users(model, [name, *others])]
    one_pass = wanted == "input" and not by_block
    own = [name for name in usable if one_pass or has_input_vectors(model.get_submodule(name))]
    others = [name for name in usable if name not in own]
    silent = {"advance": lambda: None} if own else {}
    passes: list[tuple[list[str], MetricKind, dict[str, Any]]] = [(own, wanted, {}), (others, "input", silent)]
    reached = not usable
    for names, used, changes in passes:
        if names:
            for item in _collected(model, batches, names, used, by_block, options | changes | {"tied": tied}):
                reached = True
                yield item
    if not reached:
        raise TensorNetError(f"{usable[0]!r} received no input during calibration, nor did any other target; give others")


def _collected(
    model: nn.Module, batches: Sequence[Any], names: Sequence[str], kind: MetricKind, by_block: bool, options: dict[str, Any]
) -> Iterator[tuple[str, KroneckerMetric]]:
    kinds = {kind, "input"} if kind in GRADIENT_KINDS else {kind}
    whole = [] if by_block else [collect_statistics(model, batches, names, kinds, **options)]
    for part in statistics_by_block(model, batches, names, kinds, **options) if by_block else whole:
        # Layers that share their input share the metric too, and the memory that it takes.
        shared: dict[InputMoment, KroneckerMetric] = {}
        for name in list(part):
            statistics = part.pop(name)
            if not statistics.called or statistics.silent:
                continue
            used = kind if statistics.reached or kind not in GRADIENT_KINDS else "input"
            metric = shared.get(statistics.input) if used == "input" else None
            if metric is None:
                made = statistics.metric(used)
                assert isinstance(made, KroneckerMetric)
                # Layers are compressed on the processor, wherever the model is.
                metric = made.to("cpu")
            if used == "input":
                shared[statistics.input] = metric
            yield name, metric
