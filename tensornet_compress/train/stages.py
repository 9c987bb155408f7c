"""A whole compression in stages: the metric, the networks, refinement, healing.

Batches have three uses, and each batch has one: stages fit some, choose by others, and are reported on the rest. What was
chosen for doing well on some batches looks better there than it is: the figures to quote are those of the last.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from time import perf_counter
from typing import Any

import torch
from torch import nn

from tensornet_compress.calibrate import Batch, Reference
from tensornet_compress.calibrate.layer_metrics import calibrated_metrics, check_metric, stored_metrics
from tensornet_compress.compressing import Budget, compress
from tensornet_compress.compressing.propagate import Propagation, propagate
from tensornet_compress.compressing.refine import BlockRefinement
from tensornet_compress.compressing.report import CompressionReport, LayerReport, StageReport
from tensornet_compress.compressing.sizes import Sizes
from tensornet_compress.errors import TensorNetError
from tensornet_compress.files.steps import Steps
from tensornet_compress.metric import KroneckerMetric, StoredMetric, euclidean, loaded
from tensornet_compress.nn import KeptModules, NetworkModule, Target, find_targets, layer_weight
from tensornet_compress.nn.plan import PLAN_ATTRIBUTE, plan_targets
from tensornet_compress.nn.splitting import on_layers
from tensornet_compress.progress import Progress, SilentProgress
from tensornet_compress.train.heal import heal
from tensornet_compress.train.isvt import isvt
from tensornet_compress.train.reduction import Schedule

CHOICES = ("euclidean", "row-fisher", "input", "kronecker", "fisher")


@on_layers
def compress_in_stages(
    model: nn.Module,
    budget: Budget,
    calibration: Sequence[Batch],
    *,
    metric: str = "fisher",
    refine: bool = False,
    rank_schedule: Schedule | None = None,
    heal_steps: int = 0,
    selection: Sequence[Batch] | None = None,
    heldout: Sequence[Batch] | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> CompressionReport:
    """``compress`` and what may follow it; ``report.stages`` holds both divergences and the seconds of every stage,
    and errors of layers are those after the last one.

    Args:
        metric: a metric by name, or ``auto``: compress with each of ``CHOICES`` and keep the one that diverges least.
        refine: fit the layers again behind the compressed prefix and refine block by block; kept when it diverges less.
        rank_schedule: lower ranks by ``isvt`` under this schedule in place of ``compress`` (bf16 cores; no integers).
        heal_steps: steps of distillation from the original, 0 for none.
        selection: batches that stages choose by: the metric, whether refinement is kept, when healing ends. By default the
            last eighth of ``calibration`` that is not ``heldout`` (one batch at least), which no stage then fits.
        heldout: batches that are only reported on; by default the last eighth of ``calibration`` (one at least).
        options: go to ``compress``, or to ``isvt`` (``targets`` and ``ignore`` only).

    >>> import torch, tensornet_compress as tnc
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> sizes = dict(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    >>> model = LlamaForCausalLM(LlamaConfig(**sizes))
    >>> data = [torch.randint(32, (2, 8)) for _ in range(4)]
    >>> report = tnc.train.compress_in_stages(model, tnc.Budget(bits_per_weight=8), data, heal_steps=2, workers=1)
    >>> [stage.name for stage in report.stages]
    ['fisher', 'heal']

    Raises:
        TensorNetError: too few batches, options that exclude each other, or anything that a stage refuses.
    """
    if rank_schedule is not None and (refine or metric == "auto"):
        raise TensorNetError("isvt goes with one metric and without block refinement; leave out refine and metric='auto'")
    if metric != "auto":
        check_metric(metric)
    batches, chosen_by, held = _split(calibration, selection, heldout)
    run = _Stages(model, chosen_by, held, progress or SilentProgress(), keep_original=heal_steps > 0)
    if rank_schedule is not None:
        report = run.lower_ranks(budget, batches, metric, rank_schedule, options)
    elif metric == "auto":
        report = run.choose(budget, batches, options)
    else:
        report = run.compress(metric, budget, batches, metric, options)
    refined = refine and run.refine(batches)
    if heal_steps:
        run.heal(batches, heal_steps)
    if refined or heal_steps:
        report = run.with_errors(report, batches, options.get("by_block", False))
    return report.model_copy(update={"stages": tuple(run.reports)})


def _split(
    calibration: Sequence[Batch], selection: Sequence[Batch] | None, heldout: Sequence[Batch] | None
) -> tuple[list[Batch], list[Batch], list[Batch]]:
    """Batches to fit, to choose by and to report on."""
    batches = list(calibration)
    cut = max(1, len(batches) // 8)
    parts: list[list[Batch]] = []
    for given in (heldout, selection):
        if given is not None:
            parts.append(list(given))
        else:
            batches, taken = batches[:-cut], batches[-cut:]
            parts.append(taken)
    held, chosen_by = parts
    if not batches or not chosen_by or not held:
        raise TensorNetError(
            f"stages need batches to fit, to choose by and to report on, were given {len(batches)}, {len(chosen_by)} and "
            f"{len(held)}; give more calibration batches"
        )
    return batches, chosen_by, held


class _Stages:
    def __init__(
        self,
        model: nn.Module,
        selection: Sequence[Batch],
        held: Sequence[Batch],
        progress: Progress,
        keep_original: bool,
    ):
        self.model, self.progress = model, progress
        self.original = KeptModules(model)
        self.teacher = copy.deepcopy(model) if keep_original else None
        self.selection, self.held = Reference(model, selection), Reference(model, held)
        self.reports: list[StageReport] = []

    def _note(self, name: str, started: float) -> float:
        """Report a stage; its divergence on the batches that are chosen by."""
        seconds = perf_counter() - started
        report = StageReport(
            name=name,
            divergence=self.held.divergence(),
            selection=self.selection.divergence(),
            seconds=round(seconds, 3),
        )
        self.reports.append(report)
        return report.selection

    def compress(
        self, name: str, budget: Budget, batches: Sequence[Batch], metric: str, options: dict[str, Any]
    ) -> CompressionReport:
        started = perf_counter()
        report = compress(self.model, budget, batches, metric=metric, progress=self.progress, **options)
        self._note(name, started)
        return report

    def choose(self, budget: Budget, batches: Sequence[Batch], options: dict[str, Any]) -> CompressionReport:
        """Compress with every metric and keep the best."""
        tried = []
        for kind in CHOICES:
            self.original.put_back()
            report = self.compress(kind, budget, batches, kind, options)
            tried.append((self.reports[-1].selection, report, KeptModules(self.model)))
        best = min(range(len(tried)), key=lambda number: tried[number][0])
        self.reports = [
            stage.model_copy(update={"kept": number == best, "name": f"metric {stage.name}"})
            for number, stage in enumerate(self.reports)
        ]
        _, report, modules = tried[best]
        modules.put_back()
        return report

    def lower_ranks(
        self, budget: Budget, batches: Sequence[Batch], metric: str, schedule: Schedule, options: dict[str, Any]
    ) -> CompressionReport:
        started = perf_counter()
        chosen, skipped = find_targets(self.model, options.get("targets"), options.get("ignore", ()))
        sizes = Sizes.of(self.model, chosen, budget)
        result = isvt(self.model, batches, budget, metric=metric, schedule=schedule, progress=self.progress, **options)
        self._note(f"isvt, {metric}", started)
        errors = _layer_errors(self.model, self.original, chosen, batches, metric)
        layers = []
        for target in chosen:
            network: Any = self.model.get_submodule(target.name)
            family = "dense" if result.ranks[target.name] is None else "svd"
            layers.append(LayerReport.of(sizes, target, network.network(), errors[target.name], family=family))
        notes = (result.advice,) if result.advice else ()
        seconds = {"isvt": perf_counter() - started}
        return CompressionReport.of(
            budget, sizes, layers, skipped, allocator="isvt", method="svd", metric=metric, seconds=seconds, notes=notes
        )

    def refine(self, batches: Sequence[Batch]) -> bool:
        """Propagation and block refinement; undone when the divergence on the selection batches does not fall, or when they
        end before they are done. Whether they were kept."""
        started = perf_counter()
        compressed, plan = KeptModules(self.model), getattr(self.model, PLAN_ATTRIBUTE)
        before = next(stage.selection for stage in reversed(self.reports) if stage.kept)
        settings = Propagation(refinement=BlockRefinement())
        try:
            self.original.put_back()
            propagate(self.model, plan, batches, settings, self.progress)
            after = self._note("refine", started)
        except BaseException:
            compressed.put_back()
            raise
        if after >= before:
            compressed.put_back()
            self.reports[-1] = self.reports[-1].model_copy(update={"kept": False})
        return self.reports[-1].kept

    def heal(self, batches: Sequence[Batch], steps: int) -> None:
        """Distillation from the original."""
        started = perf_counter()
        heal(self.model, batches, teacher=self.teacher, steps=steps, validation=self.selection.inputs, progress=self.progress)
        self._note("heal", started)

    def with_errors(self, report: CompressionReport, batches: Sequence[Batch], by_block: bool) -> CompressionReport:
        """The report with errors of layers as they are now."""
        plan = getattr(self.model, PLAN_ATTRIBUTE)
        errors = _layer_errors(self.model, self.original, plan_targets(self.model, plan), batches, report.metric, by_block)
        layers = tuple(layer.model_copy(update={"error": errors[layer.name]}) for layer in report.layers)
        return report.model_copy(update={"layers": layers})


def _layer_errors(
    model: nn.Module,
    original: KeptModules,
    targets: Sequence[Target],
    batches: Sequence[Batch],
    metric: str,
    by_block: bool = False,
) -> dict[str, float]:
    """Squared error of each target in its metric, relative to the squared norm of the dense weight, by name.

    Args:
        model: compressed; every target is a network module. It is dense while the metrics are calibrated, and then again what
            it was.
        original: the dense modules of ``model``.
        metric, by_block: as for ``compress``; with the same ``batches`` the metrics are those that it compressed in.
    """
    compressed = KeptModules(model)
    steps, metrics = Steps.passing(), dict[str, KroneckerMetric | StoredMetric]()
    try:
        original.put_back()
        if by_block:
            metrics.update(stored_metrics(model, batches, targets, metric, steps))
        else:
            metrics.update(calibrated_metrics(model, batches, targets, metric))
    finally:
        compressed.put_back()
    return {
        target.name: _relative_error(original.module(target.name), compressed.module(target.name), metrics.get(target.name))
        for target in targets
    }


def _relative_error(dense: nn.Module, network: nn.Module, metric: KroneckerMetric | StoredMetric | None) -> float:
    assert isinstance(network, NetworkModule)
    inner = loaded(metric) or euclidean()
    weight = layer_weight(dense).float()
    matrix = weight.reshape(len(weight), -1)
    change = matrix - network.network().to_dense(torch.float32).reshape(matrix.shape)
    inner = inner.to(matrix.device)
    return inner.norm2(change) / max(inner.norm2(matrix), 1e-300)
