"""``compress``: the whole offline job, from a model and a budget to a model of networks and a report."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import log2
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from tensornet_compress.calibrate import Batch, Loss, check_calibration, token_count
from tensornet_compress.coding import EntropyCoded, NumberFormat, parse_format
from tensornet_compress.compressing.allocate import Market, Pick, choose_options, uniform_options
from tensornet_compress.compressing.budget import Budget
from tensornet_compress.compressing.clock import Clock
from tensornet_compress.compressing.jobs import EFFORTS, Effort, Made, Method, Surveyed, make_job
from tensornet_compress.compressing.kept import MadeFiles, kept_jobs
from tensornet_compress.compressing.propagate import Propagation, propagate
from tensornet_compress.compressing.report import CompressionReport, LayerReport
from tensornet_compress.compressing.sizes import Sizes
from tensornet_compress.compressing.survey import ModelSurvey, survey_model, uniform_share
from tensornet_compress.errors import BudgetError, TensorNetError
from tensornet_compress.files.steps import Steps
from tensornet_compress.nn import KeptModules, find_targets, install, layer_weight
from tensornet_compress.nn.plan import Plan, plan_of
from tensornet_compress.nn.splitting import on_layers
from tensornet_compress.options import FAMILIES, Option, pareto
from tensornet_compress.options.offered import DENSE_FORMATS, formats_named
from tensornet_compress.progress import Progress, SilentProgress
from tensornet_compress.tensor import NetworkSpec

Allocator = Literal["sensitivity", "energy", "uniform"]
# Beyond these bits most codes would no longer fit the eight that they are multiplied in.
_MOST_CODED_BITS = 8.0
_LEAST_USED, _AIM = 0.99, 0.997
_ROUNDS = 5
_RETIRED = ("refine", "sensitivity")
# Half of what calibration asks for: the whole of it fits the calibration text rather than the language.
PROPAGATION = Propagation(correction=0.5)
_LEAST_PROPAGATED = 0.985


@on_layers
def compress(
    model: nn.Module,
    budget: Budget,
    calibration: Iterable[Batch] | None = None,
    *,
    targets: Sequence[str] | None = None,
    ignore: Sequence[str] = (),
    method: Method = "auto",
    formats: str | Sequence[str] | None = None,
    allocator: Allocator = "sensitivity",
    metric: str = "fisher",
    sweeps: int = 1,
    workers: int | None = None,
    source: Path | None = None,
    search: float | None = None,
    by_block: bool = False,
    effort: Effort = "default",
    survey: ModelSurvey | None = None,
    loss: Loss | None = None,
    device: str | torch.device | None = None,
    steps: Steps | None = None,
    progress: Progress | None = None,
    **retired: object,
) -> CompressionReport:
    """Replace the targeted layers of ``model`` by networks, in place, within ``budget``.

    One multiplier joins nats of divergence and bytes: it sets the step of entropy-coded integers, the ranks of networks, and
    the form that each layer takes.

    Args:
        model: any module; transformers models can afterwards be saved with ``tnc.save``.
        budget: see ``Budget``.
        calibration: batches of int64 ids (batch, length), or whatever else the model is called with: keywords in a dict,
            positional arguments in a list, one tensor. Without them errors are Euclidean, and the allocator must be
            ``energy`` or ``uniform``.
        targets, ignore: patterns on module names, see ``nn.find_targets``. By default every linear layer, convolution and
            embedding, tied output heads included; where only stepped ``formats`` are asked for, embeddings and heads are left
            alone.
        method: ``auto`` stores layers as entropy-coded integers with one quantisation step in the metric, or as two cores
            of such where their singular values promise less loss. ``coded`` does the first alone, ``sorted`` sorts the entries
            of each row (EinSort, see docs/concepts.md), for comparison. A family (``dense``,
            ``svd``, ``residual``, ``tt``, ``ttm``, ``tree``, ``searched``) takes its own networks in stepped formats, dense
            floating point beside them.
        formats: stepped number formats that cores may take (see ``parse_format``), for kernels or exports; with them, or above
            8 bits a weight, ``auto`` lets all families compete. ``compressed-tensors`` or ``gguf`` stands for those of dense
            layers that ``export`` writes there without loss.
        allocator: how errors count: ``sensitivity`` in nats of divergence, ``energy`` relative to each layer's norm;
            ``uniform`` gives every layer the same share of the bytes (stepped formats only).
        metric: in which errors are measured: ``fisher``, ``euclidean``, ``diagonal``, ``input``, ``row-fisher`` or
            ``kronecker``.
        sweeps: ALS sweeps for trains and trees.
        workers: threads, or processes inside a ``cluster``; results do not depend on it.
        source: a folder of safetensors files that holds exactly the model's weights: jobs then read their tensors from there.
        search: seconds to search mode orders and topologies on one layer of each kind (its siblings share the layout); what is
            found competes as the family ``searched``. None searches nothing.
        by_block: hold the statistics of one block of the model at a time, and metrics in temporary files; the numbers are the
            same. The Fisher metric then takes one more forward pass, and disk space for what enters each block; other metrics
            with gradients take a backward pass per block.
        effort: ``fast`` leaves two cores out; ``max`` fits every layer again behind the compressed ones before it (see
            ``train.propagate``), which takes a few more passes over the calibration batches.
        survey: the result of ``survey_model`` on this model with this calibration, to try several budgets.
        loss: ``loss(model, batch)``, summed over examples, for models whose outputs tell nothing of what matters; batches may
            then be anything, and divergences are per example.
        device: where calibration runs, ``cuda`` say, for a model that stays in main memory or in its files: with ``by_block``
            one block and what lies outside blocks are there at a time, otherwise the whole model. None: where the model is.
            Layers are compressed on the processor.
        steps: finished steps of an earlier run of the same call, see ``compress_folder``.
        progress: receives stages and steps.

    Raises:
        TargetError: a pattern without a match, a weight with NaN.
        BudgetError: the budget cannot be met.
        TensorNetError: any other bad input.
    """
    _check_retired(retired)
    formats, method = formats_named(formats, method)  # type: ignore[assignment]
    # An unknown name is refused here, not after calibration.
    for name in formats or ():
        parse_format(name)
    if allocator not in ("sensitivity", "energy", "uniform"):
        raise TensorNetError(f"unknown allocator {allocator!r}; choose sensitivity, energy or uniform")
    batches = list(calibration) if calibration is not None else []
    check_calibration(model, batches)
    if allocator == "sensitivity" and not batches and survey is None:
        raise TensorNetError(
            "the sensitivity allocator needs calibration batches; give some, or choose allocator='energy' or 'uniform'"
        )
    if effort not in EFFORTS:
        raise TensorNetError(f"unknown effort {effort!r}; choose {', '.join(EFFORTS)}")
    if effort == "max" and not batches:
        raise TensorNetError("effort='max' fits layers to what they are fed; give calibration batches")
    if method == "sorted" and (formats is not None or search is not None):
        raise TensorNetError("method 'sorted' has a format of its own; leave out formats and search")
    if method == "coded" and (formats is not None or allocator == "uniform" or search is not None):
        raise TensorNetError("method 'coded' has one step for all layers; leave out formats, search and allocator='uniform'")
    if survey is None:
        shares = None
        if allocator == "uniform" or (method == "auto" and formats is None):
            chosen = find_targets(model, targets, ignore, tables=allocator != "uniform")[0]
            sizes = Sizes.of(model, chosen, budget)
            (share,) = uniform_share(sizes)
            if allocator == "uniform":
                shares = (share,)
            elif 16 * share > _MOST_CODED_BITS:
                formats = DENSE_FORMATS
        survey = survey_model(
            model,
            batches,
            targets=targets,
            ignore=ignore,
            method=method,
            formats=formats,
            relative=allocator != "sensitivity",
            metric=metric,
            shares=shares,
            sweeps=sweeps,
            workers=workers,
            source=source,
            search=search,
            by_block=by_block,
            effort=effort,
            loss=loss,
            device=device,
            steps=steps,
            progress=progress,
        )
    run = _Run(model, budget, survey, method, allocator, workers, Clock(progress or SilentProgress()))
    run.count(token_count(batches))
    picks, made = run.coded() if survey.offer.coded else run.stepped()
    if effort != "max":
        run.install(made)
    else:
        made = run.propagated(batches, picks, made)
    return run.report(picks, made)


def _check_retired(options: Mapping[str, object]) -> None:
    unknown = [name for name in options if name not in _RETIRED]
    if unknown:
        raise TypeError(f"compress() got unexpected keyword arguments {unknown}")
    for name in options:
        warnings.warn(
            f"compress({name}=...) has no effect any more: one multiplier in the Fisher metric allocates bytes",
            DeprecationWarning,
            stacklevel=3,
        )


@dataclass
class _Run:
    """One compression under way."""

    model: nn.Module
    budget: Budget
    survey: ModelSurvey
    method: str
    allocator: str
    workers: int | None
    clock: Clock

    def __post_init__(self) -> None:
        self.sizes = Sizes.of(self.model, self.survey.chosen, self.budget)
        self.layers = [self.survey.layers[target.name] for target in self.survey.chosen]
        self.notes: list[str] = []

    def count(self, tokens: int | None) -> None:
        """Note when calibration cannot have shown all that the inputs of a layer are made of."""
        linear = [self.survey.layers[target.name] for target in self.survey.chosen if target.kind in ("linear", "conv1d")]
        widest = max((layer.shape[1] for layer in linear), default=0)
        if tokens is not None and tokens < widest and self.allocator == "sensitivity":
            self.notes.append(
                f"calibration has {tokens:,} tokens for layers of up to {widest:,} inputs: what these did not show is rounded "
                "coarsely, and may be wrong on other text; give several times as many tokens"
            )

    def coded(self) -> tuple[list[Pick], dict[str, Made]]:
        """The step that meets the budget: foretold, then corrected by the bytes that all layers really take."""
        market = Market(self.layers, self.survey.offer)
        allowed = self.sizes.allowed
        step = market.step_for(_AIM * allowed)
        picks = market.at(step)
        if all(pick.spec is not None for pick in picks):
            return self.stepped()
        entries = sum(self.sizes.weights[layer.name] for layer, pick in zip(self.layers, picks) if pick.spec is None)
        best: tuple[float, dict[str, Made]] | None = None
        tried: list[tuple[float, int]] = []
        for number in range(_ROUNDS):
            made = self._make([_spec(layer, pick, step) for layer, pick in zip(self.layers, picks)], number)
            used = sum(done.network.nbytes for done in made.values())
            tried.append((log2(step), used))
            if used <= allowed and (best is None or step < best[0]):
                best = step, made
                if used >= _LEAST_USED * allowed or step <= market.finest:
                    break
            # Bytes per octave of the step: as seen between two steps, or a bit for each number.
            slope = -entries / 8
            if len(tried) > 1 and tried[-1][0] != tried[-2][0]:
                slope = min((tried[-1][1] - tried[-2][1]) / (tried[-1][0] - tried[-2][0]), 0.2 * slope)
            step = max(step * 2.0 ** ((_AIM * allowed - used) / slope), market.finest)
        if best is None:
            raise BudgetError(f"{allowed:,} bytes could not be met: {tried[-1][1]:,} were taken at the last step")
        step, made = best
        foretold = sum(layer.price * made[layer.name].error for layer in self.layers)
        if self.allocator == "sensitivity":
            self.notes.append(
                f"one step of {step:.4g} for all layers; their errors foretell a divergence of {foretold:.4g} nats per token "
                "on text like that of calibration, if there is enough of it; eval measures it on other text"
            )
        return picks, made

    def stepped(self) -> tuple[list[Pick], dict[str, Made]]:
        """Options in stepped formats."""
        offers = [_offered(layer.options, self.method) for layer in self.layers]
        nbytes = [[option.nbytes for option in options] for options in offers]
        nats = [[layer.price * option.error for option in options] for layer, options in zip(self.layers, offers)]
        if self.allocator == "uniform":
            share = self.sizes.allowed / sum(self.sizes.weights.values())
            chosen = uniform_options(nbytes, nats, [share * self.sizes.weights[layer.name] for layer in self.layers])
        else:
            chosen = choose_options(nbytes, nats, self.sizes.allowed)
        options = [offered[pick] for offered, pick in zip(offers, chosen)]
        picks = [Pick(o.family, o.nbytes, layer.price * o.error, spec=o.spec) for layer, o in zip(self.layers, options)]
        return picks, self._make([option.spec for option in options], 0)

    def _make(self, specs: Sequence[NetworkSpec], number: int) -> dict[str, Made]:
        wanted = {layer.name: spec for layer, spec in zip(self.layers, specs)}
        tasks = [(job, [wanted[layer.name] for layer in job.layers]) for job in self.survey.jobs]
        with self.clock.stage("make" if number == 0 else f"make {number}", len(tasks)) as advance:
            files = MadeFiles(self.survey.steps or Steps.nowhere(), number, tasks)
            results = kept_jobs(make_job, tasks, self.workers, advance, files.read, files.keep)
        return {done.name: done for result in results for done in result}

    def plan(self, made: Mapping[str, Made]) -> Plan:
        """The plan of these networks, while the model is the original one."""
        survey, networks = self.survey, {name: done.network for name, done in made.items()}
        origin = {"calibration": survey.calibration, "metric": survey.metric, "sweeps": survey.jobs[0].sweeps}
        return plan_of(self.model, survey.chosen, networks, **origin)

    def install(self, made: Mapping[str, Made]) -> None:
        """Put the networks into the model."""
        install(self.model, {name: done.network for name, done in made.items()}, self.plan(made))

    def propagated(self, batches: Sequence[Batch], picks: Sequence[Pick], made: Mapping[str, Made]) -> dict[str, Made]:
        """Put networks into the model that are fitted behind the compressed layers before them.

        Their codes are others, and so are their bytes: another step follows while these are too many, or once far too few.
        """
        metrics = {layer.name: layer.loaded_metric() for job in self.survey.jobs for layer in job.layers}
        original, plan, allowed = KeptModules(self.model), self.plan(made), self.sizes.allowed
        dense = {target.name: layer_weight(self.model.get_submodule(target.name)) for target in self.survey.chosen}
        try:
            for number in range(_ROUNDS):
                title = "propagate" if number == 0 else f"propagate {number}"
                with self.clock.stage(title, 1):
                    propagate(self.model, plan, batches, PROPAGATION, metrics=metrics)
                modules: dict[str, Any] = {name: self.model.get_submodule(name) for name in plan.layers}
                networks = {name: module.network() for name, module in modules.items()}
                used = sum(network.nbytes for network in networks.values())
                coded = any(
                    isinstance(fmt, EntropyCoded) for layer in plan.layers.values() for fmt in layer.spec.terms[0].formats
                )
                if (_LEAST_PROPAGATED * allowed <= used or not coded or number) and used <= allowed:
                    break
                original.put_back()
                plan = _at_another_step(plan, used / (_AIM * allowed), 8 * allowed / sum(self.sizes.weights.values()))
            else:
                raise BudgetError(f"{allowed:,} bytes could not be met: {used:,} were taken at the last step")
        except BaseException:
            original.put_back()
            raise
        found = {}
        for name, network in networks.items():
            matrix = dense[name].float().cpu().reshape(len(dense[name]), -1)
            error = metrics[name].norm2(matrix - network.to_dense(torch.float32).cpu().reshape(matrix.shape))
            found[name] = Made(name, network, error)
        return found

    def report(self, picks: Sequence[Pick], made: Mapping[str, Made]) -> CompressionReport:
        """What was done."""
        survey, chosen = self.survey, self.survey.chosen
        layers = [
            LayerReport.of(
                self.sizes,
                target,
                made[target.name].network,
                made[target.name].error / max(layer.energy, 1e-300),
                family=pick.family,
                sensitivity=layer.price if self.allocator == "sensitivity" else None,
                note=survey.notes.get(target.name, ""),
            )
            for target, layer, pick in zip(chosen, self.layers, picks)
        ]
        return CompressionReport.of(
            self.budget,
            self.sizes,
            layers,
            survey.skipped,
            allocator=self.allocator,
            method=self.method,
            metric=survey.metric,
            seconds=survey.seconds | self.clock.seconds,
            notes=(*self.notes, *self._notes(layers)),
        )

    def _notes(self, layers: Sequence[LayerReport]) -> list[str]:
        targeted = sum(layer.nbytes for layer in layers)
        allowed = self.sizes.allowed + sum(self.sizes.fixed.values())
        notes = []
        if targeted < _LEAST_USED * allowed:
            notes.append(f"{targeted:,} of {allowed:,} bytes are used: no better combination of the offered options fits")
        kept = [layer.name for layer in layers if layer.family == "dense"]
        if kept and self.method not in ("dense", "auto", "coded"):
            notes.append(f"{len(kept)} layers stay dense: no {self.method} network of theirs was worth its bytes")
        notes += [str(found) for found in self.survey.searches]
        notes += [self.survey.notes[""]] if "" in self.survey.notes else []
        if self.survey.calibration is None:
            notes.append("no calibration was given: errors are Euclidean")
        return notes


def _spec(layer: Surveyed, pick: Pick, step: float) -> NetworkSpec:
    return pick.spec if pick.spec is not None else layer.coded_spec(step, pick.rank)


def _at_another_step(plan: Plan, excess: float, bits: float) -> Plan:
    """A plan whose entropy-coded cores have a step for that many times fewer bytes, where a number takes so many bits."""

    def changed(fmt: NumberFormat) -> NumberFormat:
        if not isinstance(fmt, EntropyCoded):
            return fmt
        return fmt.model_copy(update={"step": fmt.step * 2.0 ** (bits * (excess - 1))})

    layers = {}
    for name, layer in plan.layers.items():
        terms = [term.model_copy(update={"formats": tuple(map(changed, term.formats))}) for term in layer.spec.terms]
        layers[name] = layer.model_copy(update={"spec": layer.spec.model_copy(update={"terms": tuple(terms)})})
    return plan.model_copy(update={"layers": layers})


def _offered(options: Sequence[Option], method: str) -> list[Option]:
    """The undominated options of a method: its own family, and dense floating point."""
    if method not in FAMILIES:
        return pareto(options)
    return pareto([o for o in options if o.family == method or (o.family == "dense" and o.is_float)])
