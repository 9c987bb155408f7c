"""Kinds of races: each file adds one or more."""

from tensornet_compress.bench.tracks import compressing, decoding, forward, kernels, loading  # noqa: F401
