"""``apply_plan``: the same compression once more."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from tensornet_compress.calibrate import Batch
from tensornet_compress.calibrate.batches import calibration_fingerprint
from tensornet_compress.calibrate.layer_metrics import calibrated_metrics
from tensornet_compress.compressing.layer_jobs import LayerJob, realise_layer
from tensornet_compress.compressing.survey import weight_source
from tensornet_compress.compressing.workers import run_jobs
from tensornet_compress.errors import TensorNetError
from tensornet_compress.nn import Target, install
from tensornet_compress.nn.plan import Plan


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
    metrics = calibrated_metrics(model, batches, chosen, plan.metric)
    tasks = [
        (
            LayerJob(target.name, weight_source(model, target, {}), metrics.get(target.name), sweeps=plan.sweeps),
            plan.layers[target.name].spec,
        )
        for target in chosen
    ]
    install(model, {result.name: result.network for result in run_jobs(realise_layer, tasks, workers)}, plan)
    return model
