"""Every method that the package brings: importing this fills the registries."""

from tensornet_compress.bench import ours
from tensornet_compress.bench.peers import (
    gptq,
    integers,
    kvtc,
    low_rank,
    native_networks,
    rounded_caches,
    sequence_caches,
    stock_caches,
    tensor_formats,
    ttnopt,
)

__all__ = [
    "gptq",
    "integers",
    "kvtc",
    "low_rank",
    "native_networks",
    "ours",
    "rounded_caches",
    "sequence_caches",
    "stock_caches",
    "tensor_formats",
    "ttnopt",
]
