"""A whole model in entropy-coded integers: one pass for statistics, one step for all layers, one job for layers of one input.

Bytes fall smoothly as the step grows, so a budget is met by a single number: rates of a few steps are foretold from a sample of
each layer's rows, the step that meets the budget is read off their sum, and corrected by the bytes that all layers then take.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from math import log2

import numpy as np
import torch
from scipy.interpolate import PchipInterpolator
from torch import Tensor, nn

from tensornet_compress.calibrate import Batch
from tensornet_compress.calibrate.batches import calibration_fingerprint
from tensornet_compress.calibrate.fisher_metrics import fisher_metrics
from tensornet_compress.coding import CodedFormat
from tensornet_compress.compressing.budget import Budget
from tensornet_compress.compressing.clock import Clock
from tensornet_compress.compressing.report import CompressionReport, LayerReport
from tensornet_compress.compressing.sizes import Sizes
from tensornet_compress.compressing.workers import run_jobs
from tensornet_compress.decompose.one_step import NATS_PER_ENTRY, Canceller, row_weights
from tensornet_compress.errors import BudgetError, TensorNetError
from tensornet_compress.metric import KroneckerMetric
from tensornet_compress.nn import Target, find_targets, layer_weight, replace_module
from tensornet_compress.nn.plan import PLAN_ATTRIBUTE, LayerPlan, Plan, layer_plan
from tensornet_compress.progress import Progress, SilentProgress
from tensornet_compress.tensor import NetworkSpec, TensorNetwork
from tensornet_compress.tensor.network import part_name

_MIDDLING_NATS = 0.1
_STEPS = tuple(range(-7, 7))
_SAMPLED_ROWS = 48
_SAMPLED_SHARE = 16
_LEAST_USED = 0.99
_AIM = 0.997
_ROUNDS = 4


@dataclass(frozen=True)
class CodedJob:
    """Layers that were fed the same inputs: what a process needs to code them, or to foretell their rates."""

    names: tuple[str, ...]
    weights: tuple[Tensor, ...]
    metrics: tuple[KroneckerMetric, ...]
    steps: tuple[float, ...]

    def canceller(self) -> Canceller:
        """One for all layers of the job."""
        return Canceller.of(self.metrics[0].columns, self.weights[0][0].numel())


@dataclass(frozen=True)
class CodedLayer:
    """A coded layer: its stored bytes, its error relative to its norm in the metric, and its divergence in nats a token."""

    data: Tensor
    error: float
    nats: float


def foretell_rates(job: CodedJob) -> list[list[float]]:
    """Bits of each layer at each of the job's steps, from a sample of its rows."""
    canceller = job.canceller()
    found = []
    for weight, metric in zip(job.weights, job.metrics):
        matrix = weight.reshape(len(weight), -1)
        stride = max(1, min(len(matrix) // _SAMPLED_ROWS, _SAMPLED_SHARE))
        rows = slice(stride // 2, None, stride)
        sample, weights = matrix[rows], row_weights(metric, len(matrix))[rows]
        scale = len(matrix) / len(sample)
        # Steps and foretold magnitudes of rows and columns take about a byte each.
        side = 8.0 * sum(matrix.shape) + 1000
        found.append([side + scale * canceller.codes(sample, weights, step).bits for step in job.steps])
    return found


def code_layers(job: CodedJob) -> list[CodedLayer]:
    """All layers of a job at its one step."""
    (step,) = job.steps
    canceller = job.canceller()
    layers = []
    for weight, metric in zip(job.weights, job.metrics):
        matrix = weight.reshape(len(weight), -1).float()
        coded = canceller.codes(matrix, row_weights(metric, len(matrix)), step)
        lost = metric.norm2(matrix - torch.from_numpy(coded.to_dense()))
        relative = lost / max(metric.norm2(matrix), 1e-300)
        layers.append(CodedLayer(torch.from_numpy(coded.to_bytes()), relative, (metric.rate or 0.5) * lost))
    return layers


def compress_coded(
    model: nn.Module,
    budget: Budget,
    calibration: Iterable[Batch],
    *,
    targets: Sequence[str] | None = None,
    ignore: Sequence[str] = (),
    workers: int | None = None,
    progress: Progress | None = None,
) -> CompressionReport:
    """``compress(method="coded")``: arguments as there; embeddings and output heads are targets by default."""
    batches = list(calibration)
    if not batches:
        raise TensorNetError("method 'coded' weighs errors by what the model's output loses: give calibration batches")
    chosen, skipped = find_targets(model, targets, ignore, tables=True)
    sizes = Sizes.of(model, chosen, budget)
    clock = Clock(progress or SilentProgress())
    with clock.stage("calibrate", len(batches)) as advance:
        metrics, notes = fisher_metrics(model, batches, chosen, advance=advance)
    jobs = _jobs(model, chosen, metrics)
    step = _foretold_step(jobs, sizes, workers, clock)
    layers, step = _within_budget(jobs, step, sizes, workers, clock)
    reports: list[LayerReport] = []
    plans: dict[str, LayerPlan] = {}
    for target in chosen:
        report, plans[target.name] = _install(model, target, layers[target.name], step, sizes, notes.get(target.name, ""))
        reports.append(report)
    setattr(model, PLAN_ATTRIBUTE, Plan(calibration=calibration_fingerprint(batches), metric="fisher", layers=plans))
    targeted = sum(report.nbytes for report in reports)
    return CompressionReport(
        budget=budget,
        allocator="step",
        method="coded",
        metric="fisher",
        nbytes=sizes.others + targeted,
        original_nbytes=sizes.original,
        targeted_nbytes=targeted,
        targeted_original_nbytes=sizes.targeted_original,
        targeted_weights=sum(sizes.weights.values()),
        allowed_nbytes=sizes.allowed + sum(sizes.fixed.values()),
        layers=tuple(reports),
        skipped=tuple({"name": skip.name, "kind": skip.kind, "reason": skip.reason} for skip in skipped),
        seconds=clock.seconds,
        notes=(
            f"one step of {step:.4g} for all layers; their errors foretell a divergence of "
            f"{sum(layer.nats for layer in layers.values()):.4g} nats per token",
        ),
    )


def _jobs(model: nn.Module, chosen: Sequence[Target], metrics: dict[str, KroneckerMetric]) -> list[CodedJob]:
    """Targets whose metrics share their column factor are one job."""
    groups: list[list[str]] = []
    for target in chosen:
        columns = metrics[target.name].columns
        for group in groups:
            if columns is not None and metrics[group[0]].columns is columns:
                group.append(target.name)
                break
        else:
            groups.append([target.name])
    jobs = []
    for names in groups:
        weights = tuple(layer_weight(model.get_submodule(name)).cpu() for name in names)
        jobs.append(CodedJob(tuple(names), weights, tuple(metrics[name] for name in names), ()))
    return sorted(jobs, key=lambda job: -sum(weight.numel() for weight in job.weights))


def _foretold_step(jobs: Sequence[CodedJob], sizes: Sizes, workers: int | None, clock: Clock) -> float:
    """The step at which all layers together take the bytes that are allowed."""
    middle = (_MIDDLING_NATS / NATS_PER_ENTRY / sum(sizes.weights.values())) ** 0.5
    steps = tuple(middle * 2.0**octave for octave in _STEPS)
    with clock.stage("foretell rates", len(jobs)) as advance:
        rates = run_jobs(foretell_rates, [replace(job, steps=steps) for job in jobs], workers, advance)
    nbytes = np.array([layer for job in rates for layer in job]).sum(0) / 8
    wanted = _AIM * sizes.allowed
    if nbytes[-1] > wanted:
        raise BudgetError(
            f"{sizes.allowed:,} bytes are fewer than the {int(nbytes[-1]):,} that {sum(sizes.weights.values()):,} weights take "
            "at the coarsest step; raise the budget"
        )
    octaves = np.linspace(_STEPS[0], _STEPS[-1], 1 + 64 * (len(_STEPS) - 1))
    between = PchipInterpolator(np.array(_STEPS, float), nbytes)(octaves)
    return float(middle * 2.0 ** np.interp(-wanted, -between, octaves))


def _within_budget(
    jobs: Sequence[CodedJob], step: float, sizes: Sizes, workers: int | None, clock: Clock
) -> tuple[dict[str, CodedLayer], float]:
    """Code all layers, and once more at a corrected step while they take too many bytes, or too few of those allowed."""
    entries = sum(sizes.weights.values())
    best: tuple[dict[str, CodedLayer], float] | None = None
    tried: list[tuple[float, int]] = []
    for number in range(_ROUNDS):
        with clock.stage("code" if number == 0 else f"code {number}", len(jobs)) as advance:
            results = run_jobs(code_layers, [replace(job, steps=(step,)) for job in jobs], workers, advance)
        layers = {name: layer for job, done in zip(jobs, results) for name, layer in zip(job.names, done)}
        used = sum(layer.data.numel() for layer in layers.values())
        tried.append((log2(step), used))
        if used <= sizes.allowed and (best is None or step < best[1]):
            best = layers, step
            if used >= _LEAST_USED * sizes.allowed:
                break
        # Bits per octave of the step: as seen between two steps, or one for each entry that is coded at all.
        slope = -entries / 8
        if len(tried) > 1 and tried[-1][0] != tried[-2][0]:
            slope = min((tried[-1][1] - tried[-2][1]) / (tried[-1][0] - tried[-2][0]), 0.2 * slope)
        step *= 2.0 ** ((_AIM * sizes.allowed - used) / slope)
    if best is None:
        raise BudgetError(f"{sizes.allowed:,} bytes could not be met: {tried[-1][1]:,} were taken at the last step")
    return best


def _install(
    model: nn.Module, target: Target, layer: CodedLayer, step: float, sizes: Sizes, note: str
) -> tuple[LayerReport, LayerPlan]:
    module = model.get_submodule(target.name)
    weight = layer_weight(module)
    fmt = CodedFormat(step=step, stored=layer.data.numel())
    spec = NetworkSpec.dense(tuple(weight.shape), fmt, str(weight.dtype).removeprefix("torch."))
    plan = layer_plan(target, module, spec)
    replace_module(model, target.name, TensorNetwork(spec, {part_name(0, 0, "_coded"): layer.data}), target.tied)
    report = LayerReport(
        name=target.name,
        kind=target.kind,
        family="dense",
        network=spec.describe(),
        weights=sizes.weights[target.name],
        nbytes=layer.data.numel() + sizes.fixed[target.name],
        original_nbytes=weight.numel() * weight.element_size() + sizes.fixed[target.name],
        error=layer.error,
        note=note,
    )
    return report, plan
