"""Kernels for GPUs in Triton's interpreter."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import pytest


@contextmanager
def interpreted(name: str) -> Iterator[ModuleType]:
    """A module of ``kernels``, its kernels interpreted: Triton decides when it is read."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        module = importlib.reload(importlib.import_module(f"tensornet_compress.kernels.{name}"))
    yield module
    importlib.reload(module)
