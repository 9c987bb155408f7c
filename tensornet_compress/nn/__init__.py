"""Modules whose weights are networks, and the rules for putting them into a model."""

from importlib import import_module
from typing import Any

from tensornet_compress.nn.conv import TNConv, TNConv2d
from tensornet_compress.nn.decoding import decode_all, decoded, undecoded
from tensornet_compress.nn.embedding import TNEmbedding
from tensornet_compress.nn.kinds import identity, layer_weight, module_kind, turned
from tensornet_compress.nn.linear import TNLinear
from tensornet_compress.nn.module import NetworkModule
from tensornet_compress.nn.replace import KeptModules, build_replacement, computed_weights, install, materialize, replace_module
from tensornet_compress.nn.targets import Skipped, Target, find_targets

__all__ = [
    "KeptModules",
    "NetworkModule",
    "Skipped",
    "TNConv",
    "TNConv2d",
    "TNEmbedding",
    "TNLinear",
    "Target",
    "build_replacement",
    "computed_weights",
    "decode_all",
    "decoded",
    "find_targets",
    "identity",
    "install",
    "layer_weight",
    "materialize",
    "module_kind",
    "replace_module",
    "turned",
    "undecoded",
]

# Public names whose code lies in the room `experimental`, above this one.
_EXPERIMENTAL = ("FreeOrders", "absorb_orders", "free_orders", "reordered")


def __getattr__(name: str) -> Any:
    if name in _EXPERIMENTAL:
        return getattr(import_module("tensornet_compress.experimental"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
