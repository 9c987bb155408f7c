"""Divergence of the compressed model's answers from the exact ones."""

from torch import Tensor

from tensornet_compress.bench.metrics.registry import TOKEN_METRICS, Scores, TokenMetric
from tensornet_compress.calibrate import kl_divergence
from tensornet_compress.report import Measure


def tokens(scores: Scores) -> Tensor:
    """KL(exact || compressed) of every position, (tokens,)."""
    return kl_divergence(scores.exact, scores.got)


KL = TOKEN_METRICS.add(
    TokenMetric(
        "kl",
        Measure(
            title="KL to the dense model",
            unit="nats/token",
            better="lower",
            explanation="How far the next-token distribution has moved from the original's, mean over held-out tokens.",
        ),
        tokens,
    )
)
