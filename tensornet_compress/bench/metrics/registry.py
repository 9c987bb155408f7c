"""Metrics of a language model's answers: one number for each predicted token, then a mean."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import Tensor

from tensornet_compress.bench.registry import Registry
from tensornet_compress.report import Measure


@dataclass(frozen=True)
class Scores:
    """Answers at some positions: log probabilities (tokens, vocabulary) of the exact and of the compressed model, and the
    tokens that followed (tokens,)."""

    exact: Tensor
    got: Tensor
    target: Tensor


@dataclass(frozen=True)
class TokenMetric:
    """``tokens``: scores -> a number for each token (tokens,). ``finish``: applied to the mean over all tokens. ``tasks``: the
    benchmarks that report it."""

    name: str
    measure: Measure
    tokens: Callable[[Scores], Tensor]
    finish: Callable[[float], float] = float
    tasks: tuple[str, ...] = ("weights", "kv")


TOKEN_METRICS: Registry[TokenMetric] = Registry("metric")


def metrics_of(task: str) -> list[TokenMetric]:
    """The registered metrics that a benchmark reports."""
    return [metric for metric in TOKEN_METRICS if task in metric.tasks]


def evaluate(parts: Iterable[Scores], task: str) -> dict[str, float]:
    """Every metric of a benchmark over all tokens of all parts."""
    chosen = metrics_of(task)
    totals = dict.fromkeys((metric.name for metric in chosen), 0.0)
    count = 0
    for scores in parts:
        for metric in chosen:
            totals[metric.name] += float(metric.tokens(scores).double().sum())
        count += len(scores.target)
    return {metric.name: metric.finish(totals[metric.name] / max(count, 1)) for metric in chosen}
