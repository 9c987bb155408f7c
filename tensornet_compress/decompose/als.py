"""ALS refinement of the cores of a network in a metric.

With all other cores fixed the squared error is quadratic in one core, and conjugate gradients on its normal equations
``J' M J c = J' M w`` need only contractions: no normal matrix is formed, so that any tree and any metric will do.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from tensornet_compress.metric import Metric
from tensornet_compress.tensor import TermSpec, contract_term, plan_contraction
from tensornet_compress.threads import leave_if_stopped


def refine_cores(
    cores: Sequence[Tensor],
    term: TermSpec,
    target: Tensor,
    metric: Metric,
    sweeps: int = 2,
    iterations: int = 6,
    only: Sequence[int] | None = None,
    tolerance: float = 1e-4,
) -> tuple[list[Tensor], list[float]]:
    """Lower ``metric.norm2(target - network)`` core by core; returns cores and the error before and after each sweep.

    ``target`` has the term's shape; the metric sees it as a matrix (first axis, all others). ``only`` names the cores that
    may change (all by default). The error never rises; refinement ends early when a sweep gains less than ``tolerance``.
    """
    work = list(cores)
    matrix_shape = (target.shape[0], -1)
    residual = target - contract_term(term, work)
    errors = [metric.norm2(residual.reshape(matrix_shape))]
    for _ in range(sweeps):
        for core in range(len(work)) if only is None else only:
            leave_if_stopped()
            step = _solve(work, core, term, residual, metric, iterations)
            residual = residual - contract_term(term, [*work[:core], step, *work[core + 1 :]])
            work[core] = work[core] + step
        errors.append(metric.norm2(residual.reshape(matrix_shape)))
        if errors[-2] - errors[-1] <= tolerance * errors[-2]:
            break
    return work, errors


def _solve(cores: list[Tensor], core: int, term: TermSpec, residual: Tensor, metric: Metric, iterations: int) -> Tensor:
    """Change of one core that lowers the error of ``residual``, by conjugate gradients from zero."""

    def gradient(error: Tensor) -> Tensor:
        weighted = metric.apply(error.reshape(error.shape[0], -1)).reshape(error.shape)
        return _adjoint(cores, core, term, weighted)

    change = cores[core].new_zeros(cores[core].shape)
    remainder = gradient(residual)
    direction = remainder
    power = first = float(remainder.square().sum())
    for _ in range(iterations):
        if power <= 1e-20 * first or power == 0.0:
            break
        image = contract_term(term, [*cores[:core], direction, *cores[core + 1 :]])
        curved = gradient(image)
        curvature = float((direction * curved).sum())
        if curvature <= 0:
            break
        change = change + (power / curvature) * direction
        remainder = remainder - (power / curvature) * curved
        previous, power = power, float(remainder.square().sum())
        direction = remainder + (power / previous) * direction
    return change


def _adjoint(cores: list[Tensor], core: int, term: TermSpec, weighted: Tensor) -> Tensor:
    """``J' y``: contract a tensor of the term's shape with all cores but one."""
    topology = term.topology
    others = [i for i in range(len(cores)) if i != core]
    labels = [tuple(f"p{position}" for position in range(topology.positions))]
    labels += [topology.core_labels(i) for i in others]
    program = plan_contraction(labels, topology.core_labels(core), term.sizes())
    return program.run([term.layout.apply(weighted), *(cores[i] for i in others)])
