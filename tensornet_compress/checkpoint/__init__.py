"""Saved folders: safetensors and JSON, nothing pickled, written whole or not at all."""

from tensornet_compress.checkpoint.load import load, load_plan
from tensornet_compress.checkpoint.manifest import MANIFEST, TENSORS, Manifest, read_manifest
from tensornet_compress.checkpoint.save import save
from tensornet_compress.checkpoint.single import load_network, save_network

__all__ = ["MANIFEST", "TENSORS", "Manifest", "load", "load_network", "load_plan", "read_manifest", "save", "save_network"]
