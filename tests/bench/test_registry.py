"""Registries: names are unique, and an unknown one is answered with those that exist."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass

import pytest

from tensornet_compress.bench.registry import Registry
from tensornet_compress.errors import TensorNetError


@dataclass(frozen=True)
class Entry:
    name: str


def test_entries_keep_their_order_and_unknown_names_list_them() -> None:
    registry: Registry[Entry] = Registry("thing")
    for name in ("b", "a"):
        registry.add(Entry(name))
    assert [entry.name for entry in registry.choose(None)] == ["b", "a"]
    assert [entry.name for entry in registry.choose(["a", "b", "a"])] == ["a", "b"]
    with pytest.raises(TensorNetError, match="unknown thing 'c'; choose from b, a"):
        registry.choose(["a", "c"])
    with pytest.raises(TensorNetError, match="there is a thing 'a' already"):
        registry.add(Entry("a"))


def test_the_package_brings_every_peer_of_the_tables() -> None:
    from tensornet_compress.bench import methods  # noqa: F401
    from tensornet_compress.bench.cache_case import CACHE_METHODS
    from tensornet_compress.bench.search_case import SEARCH_METHODS
    from tensornet_compress.bench.weight_case import WEIGHT_METHODS

    peers = {"svd", "fwsvd", "asvd", "svd-llm", "kfac-svd", "rtn", "gptq", "hqq", "quanto", "tensorly-tt", "tensorly-ttm"}
    assert peers | {"tltorch-ttm", "tltorch-cp", "ours"} <= {method.name for method in WEIGHT_METHODS}
    caches = {
        "quantized-quanto",
        "quantized-hqq",
        "kivi",
        "turboquant",
        "kvtc-layer",
        "kvtc-joined",
        "per-token",
        "sequence-svd",
    }
    assert caches | {"ours-live", "ours-storage"} <= {method.name for method in CACHE_METHODS}
    assert {"svd", "tt-native", "ht-balanced", "ttnopt", "teneva", "ours"} <= {method.name for method in SEARCH_METHODS}


def test_the_registries_fill_whatever_is_imported_first() -> None:
    for module in ("peers.ttnopt", "tracks"):
        code = f"import tensornet_compress.bench.{module}"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
