"""Modules whose weights are networks, and the rules for putting them into a model."""

from tensornet_compress.nn.absorb import FreeOrders, absorb_orders, free_orders, reordered
from tensornet_compress.nn.conv import TNConv2d
from tensornet_compress.nn.embedding import TNEmbedding
from tensornet_compress.nn.linear import TNLinear
from tensornet_compress.nn.module import NetworkModule, decoded
from tensornet_compress.nn.replace import KeptModules, build_replacement, materialize, replace_module
from tensornet_compress.nn.targets import Skipped, Target, find_targets, layer_weight, module_kind

__all__ = [
    "FreeOrders",
    "KeptModules",
    "NetworkModule",
    "Skipped",
    "TNConv2d",
    "TNEmbedding",
    "TNLinear",
    "Target",
    "absorb_orders",
    "build_replacement",
    "decoded",
    "find_targets",
    "free_orders",
    "layer_weight",
    "materialize",
    "module_kind",
    "reordered",
    "replace_module",
]
