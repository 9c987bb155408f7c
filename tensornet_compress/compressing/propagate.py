"""Fitting layer after layer to what the compressed prefix really feeds it.

A layer ``y = W x`` sits behind layers that are compressed already and receives ``x_c`` in place of ``x_d``. The weight to be
compressed is then the minimiser of ``E |W x_d - V x_c|^2``, not ``W``, and the metric is ``E[x_c x_c']`` (AA-SVD 2604.02119,
GPTAQ 2504.02692 for rounding). Blocks are taken in sequence and refined on their outputs; statistics are held for one block.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter

import torch
from pydantic import Field
from torch import Tensor, nn

from tensornet_compress.calibrate import Batch, BlockRunner
from tensornet_compress.calibrate.blocks import Hook
from tensornet_compress.calibrate.hooks import evaluating
from tensornet_compress.calibrate.layer_metrics import calibrated_metrics
from tensornet_compress.compressing.refine import BlockRefinement, refine_block, relative_error
from tensornet_compress.compressing.shift import ShiftMoments, crossed_share
from tensornet_compress.decompose import fit_network
from tensornet_compress.decompose.one_step import Canceller, is_coded
from tensornet_compress.errors import TensorNetError
from tensornet_compress.frozen import Frozen
from tensornet_compress.metric import KroneckerMetric, StoredMetric, euclidean, input_second_moment, loaded
from tensornet_compress.nn import Target, install, layer_weight
from tensornet_compress.nn.plan import Plan, plan_targets
from tensornet_compress.progress import Progress, SilentProgress
from tensornet_compress.threads import limited_threads


class Propagation(Frozen):
    """How layers are fitted behind a compressed prefix.

    ``correction``: how much of the shift between ``W`` and the least-squares weight is taken; 0 keeps ``W`` and only measures
    errors on the compressed inputs, 1 follows the calibration tokens fully, None finds for each group of layers the share
    that is best on batches left out of the fit (see ``shift.crossed_share``). ``ridge``: added to the second moment before
    it is inverted, relative to its mean diagonal. ``clip``: vectors longer than ``clip`` times the median length are scaled
    down to it (None: none), which keeps massive activations from owning the metric. ``refinement``: block-wise training.
    ``precision``: ``bfloat16`` runs matrix products of the forward passes under autocast.
    """

    correction: float | None = Field(default=None, ge=0, le=1)
    ridge: float = Field(default=0.1, gt=0)
    clip: float | None = None
    sweeps: int = 1
    refinement: BlockRefinement | None = None
    precision: str | None = None

    @property
    def dtype(self) -> torch.dtype | None:
        """``precision`` as torch knows it.

        Raises:
            TensorNetError: it names no dtype.
        """
        if self.precision is None:
            return None
        dtype = getattr(torch, self.precision, None)
        if not isinstance(dtype, torch.dtype):
            raise TensorNetError(f"precision {self.precision!r} is no dtype of torch; use bfloat16, or None")
        return dtype


class BlockReport(Frozen):
    """One block: mean relative squared error of its output (against the dense model's, each token relative to its own
    length) when its layers were fitted and after refinement, the share of the correction taken by each group of layers, and
    seconds of both stages."""

    name: str
    fitted: float
    corrections: dict[str, float]
    refined: float | None
    fit_seconds: float
    refine_seconds: float


def propagate(
    model: nn.Module,
    plan: Plan,
    calibration: Sequence[Batch],
    settings: Propagation | None = None,
    progress: Progress | None = None,
    metrics: Mapping[str, KroneckerMetric | StoredMetric] | None = None,
) -> list[BlockReport]:
    """Compress ``model`` (dense, in place) by the specs of ``plan``, fitting every layer behind the compressed ones before it.

    Planned layers outside the blocks are realised on their dense inputs first, and the blocks are fed by them. Bytes are those
    of the plan, except of entropy-coded cores, whose codes are others; the model's plan tells both. Outputs are weighed by the
    plan's metric if that is ``fisher`` or ``kronecker``, and alike otherwise; ``metrics`` saves its calibration where it is
    known. The model runs in evaluation mode, and has its own again at the end.

    >>> import torch, tensornet_compress as tnc
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> sizes = dict(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    >>> model = LlamaForCausalLM(LlamaConfig(**sizes))
    >>> dense, data = LlamaForCausalLM(model.config), [torch.randint(32, (2, 8)) for _ in range(4)]
    >>> report = tnc.compress(model, tnc.Budget(bits_per_weight=6), data, method="dense", workers=1)
    >>> blocks = tnc.train.propagate(dense, model.tensornet_plan, data)
    >>> [block.name for block in blocks]
    ['model.layers.0', 'model.layers.1']

    Raises:
        TensorNetError: no batches, a plan that names modules that the model lacks, or a bad setting.
        TargetError: no planned layer lies in a list of blocks.
    """
    settings = settings or Propagation()
    targets = plan_targets(model, plan)
    if plan.metric not in ("fisher", "kronecker"):
        metrics = {}
    elif metrics is None:
        metrics = calibrated_metrics(model, calibration, targets, plan.metric)
    plan = plan.model_copy(update={"propagation": settings.model_dump(mode="json")})
    reports = []
    with evaluating(model):
        runner = BlockRunner(model, calibration, list(plan.layers), settings.dtype)
        prefixes = [f"{name}." for name, _ in runner.blocks]
        outside = [target for target in targets if not target.name.startswith(tuple(prefixes))]
        with limited_threads():
            plan = _realise_outside(model, plan, calibration, outside, settings, metrics)
        # What lies outside may feed the blocks: the states behind it, and all else that blocks are called with.
        behind = BlockRunner(model, calibration, list(plan.layers), settings.dtype) if outside else runner
        fitting = _Fitting(model, plan, runner, behind, settings, metrics)
        with (progress or SilentProgress()).stage("propagate", len(runner.blocks)) as advance:
            for number in range(len(runner.blocks)):
                reports.append(fitting.block(number))
                advance()
    return reports


def _realise_outside(
    model: nn.Module,
    plan: Plan,
    calibration: Sequence[Batch],
    targets: Sequence[Target],
    settings: Propagation,
    metrics: Mapping[str, KroneckerMetric | StoredMetric],
) -> Plan:
    if targets and not metrics:
        metrics = calibrated_metrics(model, calibration, targets, "input")
    networks = {}
    for name in (target.name for target in targets):
        weight = layer_weight(model.get_submodule(name)).contiguous()
        metric = loaded(metrics.get(name))
        networks[name] = fit_network(
            weight, plan.layers[name].spec, metric and metric.to(weight.device), sweeps=settings.sweeps
        )
    plan = plan.of_networks(networks)
    install(model, networks, plan)
    return plan


@dataclass
class _Fitting:
    """``original`` calls the blocks as the dense model does, ``runner`` as the compressed one (the same where no compressed
    layer lies outside the blocks)."""

    model: nn.Module
    plan: Plan
    original: BlockRunner
    runner: BlockRunner
    settings: Propagation
    metrics: Mapping[str, KroneckerMetric | StoredMetric]

    def __post_init__(self) -> None:
        self.dense = list(self.original.states)
        self.compressed = list(self.runner.states)

    def block(self, number: int) -> BlockReport:
        """Fit and refine one block, and move the states of both models past it."""
        started = perf_counter()
        runner, settings = self.runner, self.settings
        prefix, block = runner.blocks[number]
        inside = [name.removeprefix(f"{prefix}.") for name in self.plan.layers if name.startswith(f"{prefix}.")]
        with torch.no_grad():
            groups = runner.groups(number, inside) if inside else []
            targets, given = self._dense_pass(number, [group[0] for group in groups])
            corrections = {}
            for group in groups:
                halves = self._moments(number, group[0], given.pop(group[0]))
                corrections["+".join(group)] = self._fit(prefix, block, group, halves)
            outputs = runner.outputs(number, self.compressed)
            fitted = relative_error(runner, outputs, targets)
        fit_seconds, started = perf_counter() - started, perf_counter()
        refined = None
        if settings.refinement is not None and inside:
            refined = refine_block(runner, number, self.compressed, targets, fitted, settings.refinement)
            outputs = runner.outputs(number, self.compressed)
        self.dense, self.compressed = targets, outputs
        return BlockReport(
            name=prefix,
            fitted=fitted,
            corrections=corrections,
            refined=refined,
            fit_seconds=fit_seconds,
            refine_seconds=perf_counter() - started,
        )

    def _dense_pass(self, number: int, names: Sequence[str]) -> tuple[list[Tensor], dict[str, list[Tensor]]]:
        """Outputs of the dense block on the dense prefix's states, and what each named module was given."""
        given: dict[str, list[Tensor]] = {name: [] for name in names}
        versions: list[tuple[Tensor, int]] = []
        copied = False

        def note(name: str) -> Hook:
            def hook(tensor: Tensor) -> None:
                versions.append((tensor, tensor._version))
                given[name].append(tensor.clone() if copied else tensor)

            return hook

        outputs: list[Tensor] = []
        with self.original.listening(number, {name: note(name) for name in names}):
            for batch, state in enumerate(self.dense):
                output = self.original.run(number, batch, state)
                if not copied and any(tensor._version != version for tensor, version in versions):
                    # The block changes its inputs in place: again with copies, which other blocks need no memory for.
                    copied = True
                    for noted in given.values():
                        del noted[batch:]
                    output = self.original.run(number, batch, state)
                versions.clear()
                outputs.append(output)
        return outputs, given

    def _moments(self, number: int, name: str, dense: Sequence[Tensor]) -> list[ShiftMoments]:
        """What a module is given, over all even and all odd batches."""
        halves = [ShiftMoments(), ShiftMoments()]
        for batch, state in enumerate(self.compressed):

            def hook(given: Tensor, batch: int = batch) -> None:
                vectors = self.runner.kept(batch, given).float()
                shift = self.runner.kept(batch, dense[batch]).float() - vectors
                halves[batch % 2].add(vectors, shift, self.settings.clip)

            self.runner.run_until(number, batch, state, {name: hook}, name)
        return [half for half in halves if half.count]

    def _fit(self, prefix: str, block: nn.Module, group: Sequence[str], halves: Sequence[ShiftMoments]) -> float:
        """Realise the layers of a group; the share of the correction taken."""
        whole = ShiftMoments.joined(halves)
        weights = [layer_weight(block.get_submodule(name)) for name in group]
        matrices = [weight.double().reshape(weight.shape[0], -1) for weight in weights]
        with limited_threads():
            share, ridge = self.settings.correction, self.settings.ridge
            if share is None:
                share = crossed_share(halves, torch.cat(matrices), ridge)
            shift = share * whole.regression(ridge) if share else None
            networks = {}
            columns = input_second_moment(whole.second).columns
            assert columns is not None
            coded = [is_coded(self.plan.layers[f"{prefix}.{name}"].spec) for name in group]
            canceller = Canceller.of(columns, len(columns)) if any(coded) else None
            for name, weight, matrix in zip(group, weights, matrices):
                target = matrix if shift is None else matrix + matrix @ shift
                target = target.reshape(weight.shape).to(weight.dtype).contiguous()
                full = f"{prefix}.{name}"
                own = loaded(self.metrics.get(full)) or euclidean()
                metric = KroneckerMetric(own.rows, columns, own.rate)
                spec = self.plan.layers[full].spec
                networks[full] = fit_network(target, spec, metric, self.settings.sweeps, canceller if is_coded(spec) else None)
            self.plan = self.plan.of_networks(networks)
            install(self.model, networks, self.plan)
        return share
