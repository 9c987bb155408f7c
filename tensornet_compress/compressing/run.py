"""``compress``: the whole offline job, from a model and a budget to a model of networks and a report."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from torch import nn

from tensornet_compress.calibrate import Batch, OperatingPoint, first_tokens
from tensornet_compress.compressing.allocate import Allocation
from tensornet_compress.compressing.budget import Budget
from tensornet_compress.compressing.clock import Clock
from tensornet_compress.compressing.coded import compress_coded
from tensornet_compress.compressing.report import CompressionReport, LayerReport
from tensornet_compress.compressing.sizes import Sizes
from tensornet_compress.compressing.survey import FISHER_TOKENS, ModelSurvey, survey_model, uniform_share
from tensornet_compress.compressing.words import Allocator, Method, Sensitivity
from tensornet_compress.errors import TensorNetError
from tensornet_compress.nn import find_targets, install
from tensornet_compress.nn.plan import plan_of
from tensornet_compress.progress import Progress, SilentProgress


def compress(
    model: nn.Module,
    budget: Budget,
    calibration: Iterable[Batch] | None = None,
    *,
    targets: Sequence[str] | None = None,
    ignore: Sequence[str] = (),
    method: Method = "auto",
    formats: Sequence[str] | None = None,
    allocator: Allocator = "sensitivity",
    sensitivity: Sensitivity = "fisher",
    metric: str = "input",
    refine: int = 2,
    sweeps: int = 1,
    workers: int | None = None,
    source: Path | None = None,
    search: float | None = None,
    by_block: bool = False,
    survey: ModelSurvey | None = None,
    progress: Progress | None = None,
) -> CompressionReport:
    """Replace the targeted layers of ``model`` by networks, in place, within ``budget``.

    Args:
        model: any module; transformers models can afterwards be saved with ``tnc.save``.
        budget: see ``Budget``.
        calibration: batches of int64 ids (batch, length), or dicts with ``input_ids`` and ``attention_mask``. Without them the
            Euclidean metric is used and sensitivities cannot be measured.
        targets, ignore: patterns on module names, see ``nn.find_targets``. By default every linear and convolution layer
            but the output head; with ``coded`` embeddings and heads too.
        method: ``coded`` stores every layer as entropy-coded integers, with one quantisation step in the Fisher metric for all
            of them: up to 4.5 bits the least loss of all methods. Otherwise the family of networks; ``auto`` lets all
            families compete. Dense floating point always competes, dense integers
            only under ``dense`` and ``auto``.
        formats: number formats that cores may take (see ``parse_format``); by default all of them.
        allocator: ``sensitivity`` (measured divergence per unit of error, knapsack), ``energy`` (relative error, knapsack) or
            ``uniform`` (every layer the same share).
        metric: in which errors are measured: ``euclidean``, ``diagonal``, ``input``, ``row-fisher`` or ``kronecker``.
        sensitivity: how sensitivities are measured: ``fisher`` (one backward pass for all layers) or ``probe`` (one forward
            pass per layer with that layer compressed).
        refine: with calibration and the ``sensitivity`` allocator, how often sensitivities are measured anew at the compressed
            model and the bytes allocated again; the allocation of least divergence on calibration tokens wins.
        sweeps: ALS sweeps for trains and trees.
        workers: processes; results do not depend on it.
        source: a folder of safetensors files that holds exactly the model's weights: jobs then read their tensors from there.
        search: seconds to search mode orders and topologies on one layer of each kind (its siblings share the layout); what is
            found competes as the family ``searched``. None searches nothing.
        by_block: hold the statistics of one block of the model at a time, and metrics in temporary files; the numbers are the
            same. Gradient metrics then take a backward pass per block.
        survey: the result of ``survey_model`` on this model with this calibration, to try several budgets.
        progress: receives stages and steps.

    Raises:
        TargetError: a pattern without a match, a weight with NaN.
        BudgetError: the budget cannot be met.
        TensorNetError: any other bad input.
    """
    if allocator not in ("sensitivity", "energy", "uniform"):
        raise TensorNetError(f"unknown allocator {allocator!r}; choose sensitivity, energy or uniform")
    batches = list(calibration) if calibration is not None else []
    if method == "coded":
        ignored = {"formats": formats, "search": search, "by_block": by_block or None, "survey": survey}
        given = [name for name, value in ignored.items() if value is not None]
        if given or (allocator, metric) != ("sensitivity", "input"):
            raise TensorNetError(
                f"method 'coded' has one step in the Fisher metric for all layers; leave out {given or 'allocator and metric'}"
            )
        return compress_coded(model, budget, batches, targets=targets, ignore=ignore, workers=workers, progress=progress)
    if allocator == "sensitivity" and not batches and survey is None:
        raise TensorNetError(
            "the sensitivity allocator needs calibration batches; give some, or choose allocator='energy' or 'uniform'"
        )
    chosen = survey.chosen if survey is not None else find_targets(model, targets, ignore)[0]
    sizes = Sizes.of(model, chosen, budget)
    if survey is None:
        survey = survey_model(
            model,
            batches,
            targets=targets,
            ignore=ignore,
            method=method,
            formats=formats,
            sensitivity=sensitivity if allocator == "sensitivity" else None,
            metric=metric,
            shares=uniform_share(sizes) if allocator == "uniform" else None,
            sweeps=sweeps,
            workers=workers,
            source=source,
            search=search,
            by_block=by_block,
            progress=progress,
        )
    clock = Clock(progress or SilentProgress())
    allocation = Allocation(survey, method, sizes, allocator, workers, clock)
    divergences: list[float] = []
    if allocator == "sensitivity" and refine and batches:
        tied = {target.name: target.tied for target in chosen}
        point = OperatingPoint(model, first_tokens(batches, FISHER_TOKENS, 256), tied)
        picks, realised, divergences = allocation.refine(point, refine)
    else:
        picks, realised = allocation.solve()
    layers = [
        LayerReport.of(
            sizes,
            target,
            done.network,
            done.error / max(layer.energy, 1e-300),
            family=pick.family,
            sensitivity=survey.sensitivity.get(target.name),
            note=survey.note(job),
        )
        for target, job, layer, pick, done in zip(chosen, survey.jobs, survey.layers, picks, realised)
    ]
    networks = {target.name: done.network for target, done in zip(chosen, realised)}
    origin = {"calibration": survey.calibration, "metric": survey.metric, "sweeps": survey.jobs[0].sweeps}
    install(model, networks, plan_of(model, chosen, networks, **origin))
    return _report(budget, method, allocator, sizes, layers, survey, clock, divergences)


def _report(
    budget: Budget,
    method: str,
    allocator: str,
    sizes: Sizes,
    layers: Sequence[LayerReport],
    survey: ModelSurvey,
    clock: Clock,
    divergences: Sequence[float],
) -> CompressionReport:
    targeted = sum(layer.nbytes for layer in layers)
    allowed = sizes.allowed + sum(sizes.fixed.values())
    notes = []
    if targeted < 0.99 * allowed:
        notes.append(f"{targeted:,} of {allowed:,} bytes are used: no better combination of the offered options fits")
    kept = [layer.name for layer in layers if layer.family == "dense"]
    if kept and method not in ("dense", "auto"):
        notes.append(f"{len(kept)} layers stay dense: no {method} network of theirs was worth its bytes")
    notes += [str(found) for found in survey.searches]
    if survey.calibration is None:
        notes.append("no calibration was given: errors are Euclidean")
    return CompressionReport.of(
        budget,
        sizes,
        layers,
        survey.skipped,
        allocator=allocator,
        method=method,
        metric=survey.metric if survey.calibration is not None else "euclidean",
        seconds=survey.seconds | clock.seconds,
        divergences=tuple(divergences),
        notes=tuple(notes),
    )
