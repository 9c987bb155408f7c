"""Kinds of races: each file adds one."""

from tensornet_compress.bench.tracks import compressing, decoding, forward, searching

__all__ = ["compressing", "decoding", "forward", "searching"]
