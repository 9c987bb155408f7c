"""Perplexity, and the change of cross-entropy that it comes from."""

from math import exp

from torch import Tensor

from tensornet_compress.bench.metrics.registry import TOKEN_METRICS, Scores, TokenMetric
from tensornet_compress.report import Measure

_OVERFLOW = 700.0


def surprise(scores: Scores) -> Tensor:
    """Minus the log probability of the token that followed, (tokens,)."""
    return -scores.got.gather(1, scores.target[:, None])[:, 0]


def change(scores: Scores) -> Tensor:
    """The same less that of the exact model, (tokens,)."""
    return (scores.exact - scores.got).gather(1, scores.target[:, None])[:, 0]


PERPLEXITY = TOKEN_METRICS.add(
    TokenMetric(
        "perplexity",
        Measure(title="perplexity", better="lower", explanation="Exponential of the mean cross-entropy on held-out text."),
        surprise,
        lambda mean: exp(min(mean, _OVERFLOW)),
        ("weights",),
    )
)
DCE = TOKEN_METRICS.add(
    TokenMetric(
        "dce",
        Measure(
            title="change of cross-entropy",
            unit="nats/token",
            better="lower",
            explanation="Cross-entropy on held-out text less that of the original.",
        ),
        change,
    )
)
