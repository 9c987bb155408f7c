"""Kinds of races: each file adds one or two."""

from tensornet_compress.bench.tracks import compressing, decoding, forward

__all__ = ["compressing", "decoding", "forward"]
