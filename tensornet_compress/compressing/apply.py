"""``apply_plan``: the same compression once more."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import nn

from tensornet_compress.calibrate import Batch
from tensornet_compress.calibrate.batches import calibration_fingerprint
from tensornet_compress.calibrate.layer_metrics import calibrated_metrics
from tensornet_compress.compressing.jobs import Layer, make_job
from tensornet_compress.compressing.propagate import Propagation, propagate
from tensornet_compress.compressing.survey import grouped, weight_source
from tensornet_compress.compressing.workers import run_jobs
from tensornet_compress.errors import TensorNetError
from tensornet_compress.nn import install
from tensornet_compress.nn.plan import Plan, plan_targets
from tensornet_compress.nn.splitting import split_for
from tensornet_compress.tensor import TensorNetwork


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
    split_for(model, [name for first, layer in plan.layers.items() for name in (first, *layer.tied)])
    if plan.propagation is not None:
        propagate(model, plan, batches, Propagation.model_validate(plan.propagation))
        return model
    networks = networks_of_plan(model, plan, batches, workers)
    install(model, networks, plan.of_networks(networks))
    return model


def networks_of_plan(
    model: nn.Module, plan: Plan, batches: Sequence[Batch], workers: int | None = None
) -> dict[str, TensorNetwork]:
    """The networks of a plan's layers, which are dense in the model, in metrics of these batches (none: Euclidean)."""
    chosen = plan_targets(model, plan)
    metrics = calibrated_metrics(model, batches, chosen, plan.metric)
    jobs = grouped(
        [Layer(target.name, weight_source(model, target, {}), metrics.get(target.name)) for target in chosen], plan.sweeps
    )
    specs = {name: layer.spec for name, layer in plan.layers.items()}
    results = run_jobs(make_job, [(job, [specs[layer.name] for layer in job.layers]) for job in jobs], workers)
    return {made.name: made.network for result in results for made in result}
