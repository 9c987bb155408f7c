"""The GPTQ baseline of the geometry benchmarks; it lives in the package."""

from tensornet_compress.bench.peers.weights.gptq import GPTQ, gptq_codes, gptq_network, quantise_model

__all__ = ["GPTQ", "gptq_codes", "gptq_network", "quantise_model"]
