"""Every method that the package brings: importing this fills the registries."""

from tensornet_compress.bench.ours import weights as ours_weights
from tensornet_compress.bench.peers.weights import low_rank, rtn

__all__ = ["low_rank", "ours_weights", "rtn"]
