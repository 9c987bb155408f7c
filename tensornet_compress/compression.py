"""``compress``: the whole offline job, from a model and a budget to a model of networks and a report."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from safetensors import safe_open
from torch import Tensor, nn

from tensornet_compress.budget import (
    FAMILIES,
    Budget,
    LayerJob,
    Option,
    Realised,
    Survey,
    WeightSource,
    choose_options,
    first_tokens,
    fisher_sensitivity,
    measure_sensitivity,
    pareto,
    realise_layer,
    survey_layer,
    uniform_options,
)
from tensornet_compress.budget.options import SIZE_SHARES
from tensornet_compress.errors import BudgetError, TensorNetError
from tensornet_compress.jobs import run_jobs
from tensornet_compress.metric import Batch, collect_input_moments
from tensornet_compress.nn import Skipped, Target, find_targets, layer_weight, replace_module
from tensornet_compress.plan import LayerPlan, Plan, calibration_fingerprint, layer_plan
from tensornet_compress.progress import Progress, SilentProgress
from tensornet_compress.report import CompressionReport, LayerReport

Method = Literal["auto", "dense", "svd", "tt", "ttm", "tree"]
Allocator = Literal["sensitivity", "energy", "uniform"]
Sensitivity = Literal["fisher", "probe"]
PLAN_ATTRIBUTE = "tensornet_plan"
_MISPREDICTED = 0.1
_FINE_LAYERS = 24
_ROUNDS = 3
PROBE_TOKENS = 512
FISHER_TOKENS = 4096


@dataclass
class ModelSurvey:
    """What was learned about a model before any bytes are allocated; several budgets and methods can share it."""

    chosen: list[Target]
    skipped: list[Skipped]
    jobs: list[LayerJob]
    layers: list[Survey]
    sensitivity: dict[str, float]
    calibration: str | None
    seconds: dict[str, float]

    def damage_weight(self, layer: Survey, measured: bool) -> float:
        """What a unit of squared metric error of a layer counts: measured at the output, or relative to its own norm."""
        return self.sensitivity[layer.name] if measured else 1.0 / max(layer.energy, 1e-300)


def survey_model(
    model: nn.Module,
    calibration: Iterable[Batch] | None = None,
    *,
    targets: Sequence[str] | None = None,
    ignore: Sequence[str] = (),
    method: Method = "auto",
    formats: Sequence[str] | None = None,
    sensitivity: Sensitivity | None = "fisher",
    shares: Sequence[float] | None = None,
    sweeps: int = 1,
    workers: int | None = None,
    source: Path | None = None,
    progress: Progress | None = None,
) -> ModelSurvey:
    """Calibrate, list every layer's options and measure sensitivities; the model is left as found.

    Arguments as for ``compress``; ``shares`` are the sizes of networks to consider, as shares of the dense bf16 bytes, and
    ``sensitivity=None`` measures none.
    """
    if method != "auto" and method not in FAMILIES:
        raise TensorNetError(f"unknown method {method!r}; choose auto or one of {FAMILIES}")
    batches = list(calibration) if calibration is not None else []
    chosen, skipped = find_targets(model, targets, ignore)
    clock = _Clock(progress or SilentProgress())
    moments: dict[str, Tensor] = {}
    if batches:
        with clock.stage("calibrate", len(batches)) as advance:
            moments = _moments(model, batches, chosen, advance)
    index = _weight_index(source) if source is not None else {}
    jobs = [
        LayerJob(
            name=target.name,
            source=_weight_source(model, target, index),
            moment=moments.get(target.name),
            families=FAMILIES if method == "auto" else (method,),
            formats=None if formats is None else tuple(formats),
            shares=tuple(shares) if shares is not None else _ladder(len(chosen)),
            sweeps=sweeps,
        )
        for target in chosen
    ]
    with clock.stage("survey", len(jobs)) as advance:
        layers = run_jobs(survey_layer, jobs, workers, advance)
    measured: dict[str, float] = {}
    if sensitivity is not None and batches:
        measured = _sensitivities(model, chosen, layers, batches, sensitivity, clock)
    fingerprint = calibration_fingerprint(batches) if batches else None
    return ModelSurvey(chosen, skipped, jobs, layers, measured, fingerprint, clock.seconds)


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
    sweeps: int = 1,
    workers: int | None = None,
    source: Path | None = None,
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
            but the output head.
        method: the family of networks; ``auto`` lets all families compete. Dense floating point always competes, dense integers
            only under ``dense`` and ``auto``.
        formats: number formats that cores may take (see ``parse_format``); by default all of them.
        allocator: ``sensitivity`` (measured divergence per unit of error, knapsack), ``energy`` (relative error, knapsack) or
            ``uniform`` (every layer the same share).
        sensitivity: how sensitivities are measured: ``fisher`` (one backward pass for all layers) or ``probe`` (one forward
            pass per layer with that layer compressed).
        sweeps: ALS sweeps for trains and trees.
        workers: processes; results do not depend on it.
        source: a folder of safetensors files that holds exactly the model's weights: jobs then read their tensors from there.
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
    if allocator == "sensitivity" and not batches and survey is None:
        raise TensorNetError(
            "the sensitivity allocator needs calibration batches; give some, or choose allocator='energy' or 'uniform'"
        )
    chosen = survey.chosen if survey is not None else find_targets(model, targets, ignore)[0]
    sizes = _Sizes.of(model, chosen, budget)
    if survey is None:
        survey = survey_model(
            model,
            batches,
            targets=targets,
            ignore=ignore,
            method=method,
            formats=formats,
            sensitivity=sensitivity if allocator == "sensitivity" else None,
            shares=_uniform_share(sizes) if allocator == "uniform" else None,
            sweeps=sweeps,
            workers=workers,
            source=source,
            progress=progress,
        )
    clock = _Clock(progress or SilentProgress())
    with clock.stage("realise", len(chosen)) as advance:
        picks, realised = _allocate(survey, method, sizes, allocator, workers, advance)
    layers = _replace(model, survey, picks, realised, sizes)
    plan = Plan(
        calibration=survey.calibration,
        sweeps=survey.jobs[0].sweeps,
        layers={target.name: plan for target, plan in layers.plans},
    )
    setattr(model, PLAN_ATTRIBUTE, plan)
    return _report(budget, method, allocator, sizes, layers.reports, survey, clock)


def apply_plan(
    model: nn.Module, plan: Plan, calibration: Iterable[Batch] | None = None, workers: int | None = None
) -> nn.Module:
    """Compress the original model again by its plan, in place: same model, plan and calibration give the same bytes.

    Raises:
        TensorNetError: the calibration batches are not those that the plan was made with.
    """
    batches = list(calibration) if calibration is not None else []
    fingerprint = calibration_fingerprint(batches) if batches else None
    if fingerprint != plan.calibration:
        raise TensorNetError(
            f"the plan was made with calibration {plan.calibration or 'none'}, was given {fingerprint or 'none'}; "
            "pass the same batches in the same order"
        )
    chosen = [Target(name, layer.kind, layer.tied) for name, layer in plan.layers.items()]
    missing = [target.name for target in chosen if target.name not in dict(model.named_modules())]
    if missing:
        raise TensorNetError(f"the plan speaks of modules that the model lacks: {missing[:5]}")
    moments = _moments(model, batches, chosen, lambda: None)
    tasks = [
        (
            LayerJob(target.name, _weight_source(model, target, {}), moments.get(target.name), sweeps=plan.sweeps),
            plan.layers[target.name].spec,
        )
        for target in chosen
    ]
    for target, result in zip(chosen, run_jobs(realise_layer, tasks, workers)):
        replace_module(model, target.name, result.network, target.tied)
    setattr(model, PLAN_ATTRIBUTE, plan)
    return model


@dataclass
class _Sizes:
    """Bytes of the model before compression, and what the budget leaves for the targeted layers."""

    original: int
    others: int
    targeted_original: int
    allowed: int
    weights: dict[str, int]
    fixed: dict[str, int]

    @classmethod
    def of(cls, model: nn.Module, chosen: Sequence[Target], budget: Budget) -> _Sizes:
        original = model_nbytes(model)
        weights, fixed, targeted = {}, {}, 0
        for target in chosen:
            module = model.get_submodule(target.name)
            bias = getattr(module, "bias", None)
            weight = layer_weight(module)
            weights[target.name] = weight.numel()
            fixed[target.name] = 0 if bias is None else bias.numel() * bias.element_size()
            targeted += weight.numel() * weight.element_size() + fixed[target.name]
        others = original - targeted
        if budget.bits_per_weight is not None:
            allowed = int(budget.bits_per_weight * sum(weights.values()) / 8)
        else:
            total = budget.nbytes if budget.nbytes is not None else int((budget.ratio or 0) * original)
            allowed = total - others
            if allowed <= 0:
                raise BudgetError(
                    f"the budget of {total:,} bytes is used up by the {others:,} bytes that are not targeted; "
                    "raise it, target more layers, or load the model in a smaller dtype"
                )
        return cls(original, others, targeted, allowed - sum(fixed.values()), weights, fixed)


def model_nbytes(model: nn.Module) -> int:
    """Bytes of all saved tensors of a model, shared ones counted once."""
    seen: set[tuple[int, int]] = set()
    total = 0
    for tensor in model.state_dict().values():
        key = (tensor.data_ptr(), tensor.numel())
        if key not in seen:
            seen.add(key)
            total += tensor.numel() * tensor.element_size()
    return total


class _Clock:
    """Stages with their seconds."""

    def __init__(self, progress: Progress):
        self.progress = progress
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, title: str, total: int) -> Iterator[Callable[[], None]]:
        started = time.perf_counter()
        with self.progress.stage(title, total) as advance:
            yield advance
        self.seconds[title] = round(time.perf_counter() - started, 3)


def _uniform_share(sizes: _Sizes) -> tuple[float, ...]:
    """The one size that the uniform allocator needs: bits per weight over the 16 of bf16."""
    return (8 * sizes.allowed / sum(sizes.weights.values()) / 16,)


def _ladder(layers: int) -> tuple[float, ...]:
    """Sizes to consider; a finer ladder when few layers share the budget, so that it can still be met."""
    if layers > _FINE_LAYERS:
        return SIZE_SHARES
    return tuple(SIZE_SHARES[0] * (SIZE_SHARES[-1] / SIZE_SHARES[0]) ** (step / 200) for step in range(201))


def _moments(
    model: nn.Module, batches: Sequence[Batch], chosen: Sequence[Target], advance: Callable[[], None]
) -> dict[str, Tensor]:
    """Input second moments by target; an embedding takes that of the head tied to it, since its rows have no input."""
    if not batches:
        return {}
    source: dict[str, str] = {}
    for target in chosen:
        if target.kind != "embedding":
            source[target.name] = target.name
        else:
            heads = [name for name in target.tied if isinstance(model.get_submodule(name), nn.Linear)]
            if heads:
                source[target.name] = heads[0]
    if not source:
        return {}
    collected = collect_input_moments(model, batches, list(dict.fromkeys(source.values())), advance)
    means = {id(moment): moment.mean.cpu() for moment in collected.values()}
    return {name: means[id(collected[origin])] for name, origin in source.items()}


def _weight_index(folder: Path) -> dict[str, Path]:
    index: dict[str, Path] = {}
    for path in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(str(path), framework="pt") as file:
            index.update(dict.fromkeys(file.keys(), path))
    return index


def _weight_source(model: nn.Module, target: Target, index: dict[str, Path]) -> WeightSource:
    key = f"{target.name}.weight"
    if key in index:
        return WeightSource(file=index[key], key=key, transpose=target.kind == "conv1d")
    return WeightSource(tensor=layer_weight(model.get_submodule(target.name)).cpu().contiguous())


def _sensitivities(
    model: nn.Module,
    chosen: Sequence[Target],
    surveys: Sequence[Survey],
    batches: Sequence[Batch],
    method: Sensitivity,
    clock: _Clock,
) -> dict[str, float]:
    def probe(target: Target, survey: Survey) -> Callable[[], tuple[Tensor, float]]:
        def make() -> tuple[Tensor, float]:
            dense = survey.probe.to_dense()
            return (dense.T if target.kind == "conv1d" else dense), survey.probe_error

        return make

    probes = {target.name: probe(target, survey) for target, survey in zip(chosen, surveys)}
    if method == "probe":
        with clock.stage("sensitivity", len(probes)) as advance:
            return measure_sensitivity(model, first_tokens(batches, PROBE_TOKENS, 256), probes, advance)
    kept = first_tokens(batches, FISHER_TOKENS, 256)
    with clock.stage("sensitivity", len(kept)) as advance:
        return fisher_sensitivity(model, kept, probes, advance)


@dataclass
class _Front:
    """Options of one layer, whose predictions are corrected as families and formats are measured."""

    options: list[Option]
    corrections: dict[tuple[str, str], float] = field(default_factory=dict)

    def error(self, option: Option) -> float:
        return option.error * self.corrections.get(_kind(option), 1.0)

    def learn(self, option: Option, measured: float) -> bool:
        """Note a measured error; True when the prediction was off."""
        off = abs(measured - self.error(option)) > _MISPREDICTED * max(measured, self.error(option))
        self.corrections[_kind(option)] = measured / max(option.error, 1e-300)
        return off


def _kind(option: Option) -> tuple[str, str]:
    return option.family, option.spec.terms[0].formats[0].name


def _allocate(
    survey: ModelSurvey,
    method: Method,
    sizes: _Sizes,
    allocator: Allocator,
    workers: int | None,
    advance: Callable[[], None],
) -> tuple[list[Option], list[Realised]]:
    """Predict, allocate, realise, and allocate again where realised errors belie the predictions."""
    fronts = [_Front(_offered(layer.options, method)) for layer in survey.layers]
    weights = [survey.damage_weight(layer, allocator == "sensitivity") for layer in survey.layers]
    nbytes = [[option.nbytes for option in front.options] for front in fronts]
    done: dict[tuple[int, int], Realised] = {}
    picks: list[int] = []
    for _ in range(_ROUNDS):
        damage = [[w * front.error(option) for option in front.options] for w, front in zip(weights, fronts)]
        if allocator == "uniform":
            share = sizes.allowed / sum(sizes.weights.values())
            picks = uniform_options(nbytes, damage, [share * sizes.weights[job.name] for job in survey.jobs])
        else:
            picks = choose_options(nbytes, damage, sizes.allowed)
        fresh = [(layer, pick) for layer, pick in enumerate(picks) if (layer, pick) not in done]
        tasks = [(survey.jobs[layer], fronts[layer].options[pick].spec) for layer, pick in fresh]
        off = 0
        for (layer, pick), result in zip(fresh, run_jobs(realise_layer, tasks, workers, advance)):
            done[layer, pick] = result
            off += fronts[layer].learn(fronts[layer].options[pick], result.error)
        if off == 0:
            break
    return [front.options[pick] for front, pick in zip(fronts, picks)], [done[i, pick] for i, pick in enumerate(picks)]


def _offered(options: Sequence[Option], method: Method) -> list[Option]:
    """The undominated options of a method: its own family, and dense floating point."""
    if method == "auto":
        return pareto(options)
    return pareto([o for o in options if o.family == method or (o.family == "dense" and o.is_float)])


@dataclass
class _Replaced:
    reports: list[LayerReport] = field(default_factory=list)
    plans: list[tuple[Target, LayerPlan]] = field(default_factory=list)


def _replace(
    model: nn.Module, survey: ModelSurvey, picks: Sequence[Option], realised: Sequence[Realised], sizes: _Sizes
) -> _Replaced:
    result = _Replaced()
    for target, layer, pick, done in zip(survey.chosen, survey.layers, picks, realised):
        module = model.get_submodule(target.name)
        itemsize = layer_weight(module).element_size()
        result.plans.append((target, layer_plan(target, module, done.network.spec)))
        replace_module(model, target.name, done.network, target.tied)
        result.reports.append(
            LayerReport(
                name=target.name,
                kind=target.kind,
                family=pick.family,
                network=done.network.spec.describe(),
                weights=sizes.weights[target.name],
                nbytes=done.network.nbytes + sizes.fixed[target.name],
                original_nbytes=sizes.weights[target.name] * itemsize + sizes.fixed[target.name],
                error=done.error / max(layer.energy, 1e-300),
                sensitivity=survey.sensitivity.get(target.name),
            )
        )
    return result


def _report(
    budget: Budget,
    method: str,
    allocator: str,
    sizes: _Sizes,
    layers: Sequence[LayerReport],
    survey: ModelSurvey,
    clock: _Clock,
) -> CompressionReport:
    targeted = sum(layer.nbytes for layer in layers)
    allowed = sizes.allowed + sum(sizes.fixed.values())
    notes = []
    if targeted < 0.99 * allowed:
        notes.append(f"the offered options end below the budget: {targeted:,} of {allowed:,} bytes are used")
    kept = [layer.name for layer in layers if layer.family == "dense"]
    if kept and method not in ("dense", "auto"):
        notes.append(f"{len(kept)} layers stay dense: no {method} network of theirs was worth its bytes")
    if survey.calibration is None:
        notes.append("no calibration was given: errors are Euclidean")
    return CompressionReport(
        budget=budget,
        allocator=allocator,
        method=method,
        nbytes=sizes.others + targeted,
        original_nbytes=sizes.original,
        targeted_nbytes=targeted,
        targeted_original_nbytes=sizes.targeted_original,
        targeted_weights=sum(sizes.weights.values()),
        allowed_nbytes=allowed,
        layers=tuple(layers),
        skipped=tuple({"name": skip.name, "kind": skip.kind, "reason": skip.reason} for skip in survey.skipped),
        seconds=survey.seconds | clock.seconds,
        notes=tuple(notes),
    )
