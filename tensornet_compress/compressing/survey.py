"""The survey of a model: calibration, and what every layer may become; shared by several budgets."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import e, log2, pi
from pathlib import Path

import torch
from torch import nn

from tensornet_compress.calibrate import Batch, Loss
from tensornet_compress.calibrate.batches import calibration_fingerprint
from tensornet_compress.calibrate.layer_metrics import (
    calibrated_metrics,
    calibration_steps,
    check_metric,
    stored_metrics,
)
from tensornet_compress.calibrate.lending import usable_device
from tensornet_compress.compressing.clock import Clock
from tensornet_compress.compressing.jobs import Effort, Job, Layer, Method, Offer, Surveyed, WeightSource, survey_job
from tensornet_compress.compressing.kept import SurveyFiles, kept_jobs
from tensornet_compress.compressing.layouts import LayoutSearch, layer_kind, search_layouts
from tensornet_compress.compressing.sizes import Sizes
from tensornet_compress.errors import TensorNetError
from tensornet_compress.files.index import weight_files
from tensornet_compress.files.steps import Steps
from tensornet_compress.memory import release
from tensornet_compress.metric import KroneckerMetric, StoredMetric, euclidean, loaded, loaded_in_turn
from tensornet_compress.nn import Skipped, Target, find_targets, layer_weight
from tensornet_compress.options import FAMILIES
from tensornet_compress.options.forms import SIZE_SHARES
from tensornet_compress.options.offered import STEPPED_FAMILIES
from tensornet_compress.progress import Progress, SilentProgress

METHODS: tuple[Method, ...] = ("auto", "coded", *FAMILIES)
_FINE_LAYERS = 24
# Rates are foretold at steps of these octaves around the one at which normal numbers would take so many bits.
_OCTAVES = tuple(range(-6, 6))
_MIDDLING_BITS = 4.0
_NORMAL_BITS = 0.5 * log2(2 * pi * e)


@dataclass
class ModelSurvey:
    """What was learned about a model before any bytes are allocated; several budgets can share it."""

    chosen: list[Target]
    skipped: list[Skipped]
    jobs: list[Job]
    offer: Offer
    layers: dict[str, Surveyed]
    calibration: str | None
    metric: str
    seconds: dict[str, float]
    notes: dict[str, str] = field(default_factory=dict)
    searches: list[LayoutSearch] = field(default_factory=list)
    # Where the jobs' metrics lie when they were calibrated by block, and what became of each job.
    steps: Steps | None = None


def survey_model(
    model: nn.Module,
    calibration: Iterable[Batch] | None = None,
    *,
    targets: Sequence[str] | None = None,
    ignore: Sequence[str] = (),
    method: Method = "auto",
    formats: Sequence[str] | None = None,
    relative: bool = False,
    metric: str = "fisher",
    shares: Sequence[float] | None = None,
    sweeps: int = 1,
    workers: int | None = None,
    source: Path | None = None,
    search: float | None = None,
    by_block: bool = False,
    effort: Effort = "default",
    loss: Loss | None = None,
    device: str | torch.device | None = None,
    steps: Steps | None = None,
    progress: Progress | None = None,
) -> ModelSurvey:
    """Calibrate, and list what every layer may become; the model is left as found.

    Arguments as for ``compress``; ``relative`` counts errors relative to each layer's own norm, and ``shares`` are the sizes of
    networks to consider, as shares of the dense bf16 bytes.
    """
    check_metric(metric)
    if method not in METHODS:
        raise TensorNetError(f"unknown method {method!r}; choose one of {', '.join(METHODS)}")
    if method == "searched" and search is None:
        raise TensorNetError("method 'searched' needs the seconds of a search for each kind of layer: give search=60, say")
    if search is not None and not search > 0:
        raise TensorNetError(f"search takes the seconds for each kind of layer, was given {search}")
    if loss is not None and (by_block or steps is not None or effort == "max"):
        raise TensorNetError("a loss takes one backward pass over the whole model; leave out by_block and effort='max'")
    place = usable_device(device)
    batches = list(calibration) if calibration is not None else []
    stepped = formats is not None or shares is not None or method in FAMILIES
    chosen, skipped = find_targets(model, targets, ignore, tables=not stepped)
    release(model)
    clock = Clock(progress or SilentProgress())
    notes: dict[str, str] = {}
    metrics: Mapping[str, KroneckerMetric | StoredMetric] = {}
    if steps is None and by_block:
        steps = Steps.passing()
    prices: Mapping[str, float] = {}
    if batches:
        total = calibration_steps(model, len(batches), chosen, metric) if by_block else len(batches)
        with clock.stage("calibrate", total) as advance:
            if steps is None:
                metrics = calibrated_metrics(model, batches, chosen, metric, advance, notes, place, loss=loss)
            else:
                metrics = stored_metrics(model, batches, chosen, metric, steps, by_block, advance, notes, place)
        if not relative:
            prices = _prices(model, batches, chosen, metrics, clock, loss, place)
    index = weight_files(source) if source is not None else {}
    layers = [
        Layer(target.name, weight_source(model, target, index), metrics.get(target.name), prices.get(target.name))
        for target in chosen
    ]
    searches: list[LayoutSearch] = []
    if search is not None:
        searches = list(search_layouts(layers, search, clock).values())
        layouts = {found.kind: found.layout for found in searches}
        layers = [replace(layer, layout=layouts[layer_kind(layer.name, layer.source.load().shape)]) for layer in layers]
    jobs = grouped(layers, sweeps)
    networks = method == "auto" and effort != "fast"
    offer = _offer(method, stepped, formats, shares, search is not None, networks, layers)
    with clock.stage("survey", len(jobs)) as advance:
        files = SurveyFiles(steps or Steps.nowhere())
        found = kept_jobs(survey_job, [(job, offer) for job in jobs], workers, advance, files.read, files.keep)
    surveyed = {layer.name: layer for layers_of_job in found for layer in layers_of_job}
    fingerprint = calibration_fingerprint(batches) if batches else None
    used = metric if batches else "euclidean"
    return ModelSurvey(chosen, skipped, jobs, offer, surveyed, fingerprint, used, clock.seconds, notes, searches, steps)


def _offer(
    method: Method,
    stepped: bool,
    formats: Sequence[str] | None,
    shares: Sequence[float] | None,
    searched: bool,
    networks: bool,
    layers: Sequence[Layer],
) -> Offer:
    if method != "coded" and stepped:
        families = STEPPED_FAMILIES if method == "auto" else (method,)
        sizes = tuple(shares) if shares is not None else ladder(len(layers))
        return Offer(families, None if formats is None else tuple(formats), sizes)
    metrics = loaded_in_turn(layer.metric for layer in layers)
    variances = [_variance(layer, metric) for layer, metric in zip(layers, metrics)]
    spread = sum(layer.source.numel * 0.5 * log2(max(variance, 1e-300)) for layer, variance in zip(layers, variances))
    spread /= sum(layer.source.numel for layer in layers)
    middle = spread + _NORMAL_BITS - _MIDDLING_BITS
    steps = tuple(2.0 ** (middle + octave) for octave in _OCTAVES)
    return Offer(("searched",) if searched else (), None, SIZE_SHARES, coded=True, coded_cores=networks, steps=steps)


def _variance(layer: Layer, metric: KroneckerMetric) -> float:
    """Mean square of a layer's numbers in squared steps of one, weighed by the diagonals of its metric."""
    if layer.price is None:
        return 2 / layer.source.numel
    weight = layer.source.load().float()
    squares = weight.reshape(len(weight), -1).square()
    importance, rows = metric.importance(), metric.rows
    by_row = squares.sum(1) if importance is None else squares @ importance.to(squares)
    rows = rows if rows is None or rows.ndim == 1 else rows.diagonal()
    total = by_row.double().sum() if rows is None else by_row.double() @ rows.double()
    return 2 * layer.price * float(total) / layer.source.numel


def grouped(layers: Sequence[Layer], sweeps: int) -> list[Job]:
    """Layers as jobs: those whose metrics share their column factor are one; the largest first."""
    groups: dict[object, list[Layer]] = {}
    for number, layer in enumerate(layers):
        columns = None if layer.metric is None else layer.metric.columns
        shared = columns if isinstance(columns, Path) else id(columns)
        groups.setdefault(number if columns is None else (shared,), []).append(layer)
    jobs = [Job(tuple(group), sweeps) for group in groups.values()]
    return sorted(jobs, key=lambda job: -sum(layer.source.numel for layer in job.layers))


def _prices(
    model: nn.Module,
    batches: Sequence[Batch],
    chosen: Sequence[Target],
    metrics: Mapping[str, KroneckerMetric | StoredMetric],
    clock: Clock,
    loss: Loss | None,
    device: torch.device | None,
) -> dict[str, float]:
    """Nats per token of a unit of squared error. In a metric that knows nothing of the loss a layer's weight counts as much in
    all as in the Fisher metric; a layer without a metric counts like the middling one."""
    rates = {name: metric.rate for name, metric in metrics.items()}
    found = {name: rate for name, rate in rates.items() if rate is not None}
    if len(found) == len(chosen):
        return found
    with clock.stage("calibrate prices", len(batches)) as advance:
        fisher = calibrated_metrics(model, batches, chosen, "fisher", advance, device=device, loss=loss)
    for target in chosen:
        if target.name in found:
            continue
        weight = layer_weight(model.get_submodule(target.name)).float().cpu()
        matrix = weight.reshape(len(weight), -1)
        exact, own = fisher[target.name], loaded(metrics.get(target.name)) or euclidean()
        found[target.name] = (exact.rate or 0.5) * exact.norm2(matrix) / max(own.norm2(matrix), 1e-300)
    return found


def uniform_share(sizes: Sizes) -> tuple[float, ...]:
    """The one size that the uniform allocator needs: bits per weight over the 16 of bf16."""
    return (8 * sizes.allowed / sum(sizes.weights.values()) / 16,)


def ladder(layers: int) -> tuple[float, ...]:
    """Sizes to consider; a finer ladder when few layers share the budget, so that it can still be met."""
    if layers > _FINE_LAYERS:
        return SIZE_SHARES
    return tuple(SIZE_SHARES[0] * (SIZE_SHARES[-1] / SIZE_SHARES[0]) ** (step / 200) for step in range(201))


def weight_source(model: nn.Module, target: Target, index: dict[str, Path]) -> WeightSource:
    weight = layer_weight(model.get_submodule(target.name))
    key = f"{target.name}.weight"
    if key in index:
        return WeightSource(weight.numel(), file=index[key], key=key, kind=target.kind, dtype=weight.dtype)
    return WeightSource(weight.numel(), tensor=weight.cpu().contiguous())
