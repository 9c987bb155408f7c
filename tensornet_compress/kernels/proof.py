"""Kernels for GPUs, which are used on a device once they agreed there with the reference."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from importlib import import_module
from types import ModuleType

from torch import Tensor

_AGREE = 1e-4
"""Largest error of a kernel, as a share of the largest result, on what proves it."""


def triton_module(name: str) -> ModuleType | None:
    """A module of this folder that needs Triton; None where that is not installed, or, with a warning, does not work."""
    try:
        return import_module(f"tensornet_compress.kernels.{name}")
    except ImportError:
        pass
    except Exception as error:
        warnings.warn(f"Triton is not used: {type(error).__name__}: {error}", stacklevel=2)
    return None


def agrees(found: Callable[[], Tensor], exact: Callable[[], Tensor], told: str) -> bool:
    """Whether a kernel gives what the reference gives in double precision; a warning that it does not begins with ``told``."""
    try:
        # In double precision, which neither autocast nor faster ways of multiplying round.
        wanted = exact()
        off = float((found().double() - wanted).abs().max() / wanted.abs().max())
        if off < _AGREE:
            return True
        why = f"it is off by {off:.1e}"
    except Exception as error:
        why = f"{type(error).__name__}: {error}"
    warnings.warn(f"{told}: of the Triton kernel, {why}", stacklevel=2)
    return False
