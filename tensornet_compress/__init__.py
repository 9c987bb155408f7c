"""tensornet_compress: tensor-network compression of weights and KV caches with adaptive index ordering.

Importing the package loads no optional dependency and changes no global state, but that transformers, when it is there or comes
later, can read our folders (``register``). Names are resolved on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from tensornet_compress.integrations.on_import import register_on_import
from tensornet_compress.version import __version__

if TYPE_CHECKING:
    from tensornet_compress.coding import parse_format
    from tensornet_compress.compressing import Budget, apply_plan, compress
    from tensornet_compress.compressing.report import CompressionReport
    from tensornet_compress.decompose import realise, round_cores, to_network
    from tensornet_compress.errors import TensorNetError
    from tensornet_compress.files import load, load_network, load_plan, open_tensor, save, save_network
    from tensornet_compress.integrations.export import export
    from tensornet_compress.integrations.folders import compress_folder
    from tensornet_compress.integrations.on_import import register
    from tensornet_compress.nn import TNConv2d, TNEmbedding, TNLinear, decoded, materialize
    from tensornet_compress.nn.plan import Plan
    from tensornet_compress.searching import SearchResult, search, search_within
    from tensornet_compress.tensor import Layout, NetworkSpec, TensorArray, TensorNetwork, Topology

_HOMES = {
    "Budget": "compressing",
    "CompressionReport": "compressing.report",
    "Layout": "tensor",
    "NetworkSpec": "tensor",
    "Plan": "nn.plan",
    "SearchResult": "searching",
    "TNConv2d": "nn",
    "TNEmbedding": "nn",
    "TNLinear": "nn",
    "TensorArray": "tensor",
    "TensorNetError": "errors",
    "TensorNetwork": "tensor",
    "Topology": "tensor",
    "apply_plan": "compressing",
    "compress": "compressing",
    "compress_folder": "integrations.folders",
    "decoded": "nn",
    "export": "integrations.export",
    "load": "files",
    "load_network": "files",
    "load_plan": "files",
    "materialize": "nn",
    "open_tensor": "files",
    "parse_format": "coding",
    "realise": "decompose",
    "register": "integrations.on_import",
    "round_cores": "decompose",
    "save": "files",
    "save_network": "files",
    "search": "searching",
    "search_within": "searching",
    "to_network": "decompose",
}

__all__ = [
    "Budget",
    "CompressionReport",
    "Layout",
    "NetworkSpec",
    "Plan",
    "SearchResult",
    "TNConv2d",
    "TNEmbedding",
    "TNLinear",
    "TensorArray",
    "TensorNetError",
    "TensorNetwork",
    "Topology",
    "__version__",
    "apply_plan",
    "compress",
    "compress_folder",
    "decoded",
    "export",
    "load",
    "load_network",
    "load_plan",
    "materialize",
    "open_tensor",
    "parse_format",
    "realise",
    "register",
    "round_cores",
    "save",
    "save_network",
    "search",
    "search_within",
    "to_network",
]


def __getattr__(name: str) -> Any:
    # Rooms with a public surface of their own; not in __all__, so that a star import loads neither.
    if name in ("kv", "train"):
        return import_module(f"tensornet_compress.{name}")
    if name in _HOMES:
        return getattr(import_module(f"tensornet_compress.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'tensornet_compress' has no attribute {name!r}")


register_on_import()
