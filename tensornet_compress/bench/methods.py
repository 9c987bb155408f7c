"""Every method that the package brings: importing this fills the registries."""

from tensornet_compress.bench.ours import caches as ours_caches
from tensornet_compress.bench.ours import search as ours_search
from tensornet_compress.bench.ours import weights as ours_weights
from tensornet_compress.bench.peers.caches import kvtc, rounding, sequence, stock, turboquant
from tensornet_compress.bench.peers.search import native, teneva, ttnopt
from tensornet_compress.bench.peers.weights import gptq, hqq, low_rank, quanto, rtn, tensorly, tensorly_torch

__all__ = [
    "gptq",
    "hqq",
    "kvtc",
    "low_rank",
    "native",
    "ours_caches",
    "ours_search",
    "ours_weights",
    "quanto",
    "rounding",
    "rtn",
    "sequence",
    "stock",
    "teneva",
    "tensorly",
    "tensorly_torch",
    "ttnopt",
    "turboquant",
]
