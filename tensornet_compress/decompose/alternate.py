"""A sum of networks fitted in turns: each term to what all the others leave (a quantised base and a low-rank residual)."""

from __future__ import annotations

from torch import Tensor

from tensornet_compress.decompose.quantise import ErrorFeedback
from tensornet_compress.decompose.realise import column_feedback, realise
from tensornet_compress.errors import TensorNetError
from tensornet_compress.metric import KroneckerMetric, euclidean
from tensornet_compress.tensor import NetworkSpec, TensorNetwork


def alternate_terms(
    tensor: Tensor, spec: NetworkSpec, metric: KroneckerMetric | None = None, rounds: int = 4, sweeps: int = 1
) -> tuple[TensorNetwork, list[float]]:
    """The network of a ``spec`` with several terms, and its squared error in the metric after ``realise`` and each round.

    A round realises every term anew on the tensor less the other terms (CALDERA 2405.18886, LQER 2402.02446 for an integer base
    with a low-rank correction). Rounding is not a projection, so a round may lose: the best network is kept.

    Raises:
        TensorNetError: fewer than two terms, or anything that ``realise`` refuses.
    """
    if len(spec.terms) < 2 or rounds < 0:
        raise TensorNetError(f"terms alternate in a sum of two or more; was given {len(spec.terms)} terms and {rounds} rounds")
    metric = metric or euclidean()
    feedback: ErrorFeedback | None = column_feedback(metric)
    best = realise(tensor, spec, metric, sweeps=sweeps, feedback=feedback)
    wide = tensor.detach().float()
    parts = [best.single(number) for number in range(len(spec.terms))]
    errors = [_error(wide, parts, metric)]
    for _ in range(rounds):
        for number in range(len(parts)):
            others = sum((part.to_dense(wide.dtype) for i, part in enumerate(parts) if i != number), start=wide.new_zeros(()))
            parts[number] = realise(wide - others, parts[number].spec, metric, sweeps=sweeps, feedback=feedback)
        errors.append(_error(wide, parts, metric))
        if errors[-1] <= min(errors):
            best = TensorNetwork.sum(parts)
    return best, errors


def fit_network(tensor: Tensor, spec: NetworkSpec, metric: KroneckerMetric | None = None, sweeps: int = 1) -> TensorNetwork:
    """What is stored for a ``spec`` in a compression: ``realise``, and for a sum the best of ``alternate_terms``."""
    if len(spec.terms) == 1:
        return realise(tensor, spec, metric, sweeps=sweeps)
    return alternate_terms(tensor, spec, metric, sweeps=sweeps)[0]


def _error(wide: Tensor, parts: list[TensorNetwork], metric: KroneckerMetric) -> float:
    rest = wide - sum((part.to_dense(wide.dtype) for part in parts), start=wide.new_zeros(()))
    return metric.norm2(rest.reshape(wide.shape[0], -1))
