"""Files: whole-or-nothing writes, saved folders, single networks; nothing pickled."""

from tensornet_compress.files.load import load, load_plan
from tensornet_compress.files.manifest import MANIFEST, TENSORS, Manifest, read_manifest
from tensornet_compress.files.save import save
from tensornet_compress.files.single import load_network, open_tensor, save_network

__all__ = [
    "MANIFEST",
    "TENSORS",
    "Manifest",
    "load",
    "load_network",
    "load_plan",
    "open_tensor",
    "read_manifest",
    "save",
    "save_network",
]
