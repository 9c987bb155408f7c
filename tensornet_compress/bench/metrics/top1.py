"""How often the best token stays the best."""

from torch import Tensor

from tensornet_compress.bench.metrics.registry import TOKEN_METRICS, Scores, TokenMetric
from tensornet_compress.report import Measure


def tokens(scores: Scores) -> Tensor:
    """One where both name the same token as the likeliest, (tokens,)."""
    return (scores.got.argmax(-1) == scores.exact.argmax(-1)).float()


TOP1 = TOKEN_METRICS.add(
    TokenMetric(
        "top1",
        Measure(
            title="same best token",
            better="higher",
            explanation="Share of positions at which the likeliest next token is the original's.",
        ),
        tokens,
    )
)
