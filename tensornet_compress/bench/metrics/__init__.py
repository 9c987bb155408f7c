"""What is measured: each metric is one small file here (or in a plug-in) that adds itself to a registry."""

from tensornet_compress.bench.metrics import kl, perplexity, top1
from tensornet_compress.bench.metrics.registry import TOKEN_METRICS, Scores, TokenMetric, evaluate, metrics_of

__all__ = ["TOKEN_METRICS", "Scores", "TokenMetric", "evaluate", "kl", "metrics_of", "perplexity", "top1"]
