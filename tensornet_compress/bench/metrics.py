"""Metrics of a language model's answers: a number for each predicted token, then a mean. Plug-ins may add more."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import exp, sqrt

from torch import Tensor

from tensornet_compress.bench.harness import lower
from tensornet_compress.bench.registry import Registry
from tensornet_compress.calibrate import kl_divergence
from tensornet_compress.report import Measure

_OVERFLOW = 700.0


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


@dataclass(frozen=True)
class Means:
    """``values``: means by name. ``errors``: their standard errors, where there is more than one document."""

    values: dict[str, float]
    errors: dict[str, float]


def evaluate(documents: Iterable[Scores], task: str) -> Means:
    """Every metric of a benchmark over all tokens of all documents."""
    chosen = metrics_of(task)
    totals: dict[str, list[float]] = {metric.name: [] for metric in chosen}
    counts = []
    for scores in documents:
        for metric in chosen:
            totals[metric.name].append(float(metric.tokens(scores).double().sum()))
        counts.append(len(scores.target))
    values, errors = {}, {}
    for metric in chosen:
        mean, error = mean_and_error(totals[metric.name], counts)
        values[metric.name] = metric.finish(mean)
        if error is not None:
            errors[metric.name] = metric.finish(mean + error) - values[metric.name]
    return Means(values, errors)


def mean_and_error(totals: Sequence[float], counts: Sequence[int]) -> tuple[float, float | None]:
    """The mean of numbers of which documents hold so many and so much in all, and its standard error as documents differ; None
    for less than two documents."""
    held = [(total, count) for total, count in zip(totals, counts) if count]
    whole = sum(count for _, count in held)
    mean = sum(total for total, _ in held) / max(whole, 1)
    if len(held) < 2:
        return mean, None
    apart = sum((total - count * mean) ** 2 for total, count in held)
    return mean, sqrt(apart * len(held) / (len(held) - 1)) / whole


def _of_target(log_probabilities: Tensor, target: Tensor) -> Tensor:
    return log_probabilities.gather(1, target[:, None])[:, 0]


_KL = lower(
    "KL to the dense model",
    "nats/token",
    "How far the next-token distribution has moved from the original's, mean over held-out tokens.",
)
_PERPLEXITY = lower("perplexity", explanation="Exponential of the mean cross-entropy on held-out text.")
_CHANGE = lower("change of cross-entropy", "nats/token", "Cross-entropy on held-out text less that of the original.")
_TOP1 = Measure(
    title="same best token",
    better="higher",
    explanation="Share of positions at which the likeliest next token is the original's.",
)
for _metric in (
    TokenMetric("kl", _KL, lambda s: kl_divergence(s.exact, s.got)),
    TokenMetric(
        "perplexity", _PERPLEXITY, lambda s: -_of_target(s.got, s.target), lambda mean: exp(min(mean, _OVERFLOW)), ("weights",)
    ),
    TokenMetric("dce", _CHANGE, lambda s: _of_target(s.exact - s.got, s.target)),
    TokenMetric("top1", _TOP1, lambda s: (s.got.argmax(-1) == s.exact.argmax(-1)).float()),
):
    TOKEN_METRICS.add(_metric)
