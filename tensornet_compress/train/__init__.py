"""Fitting what was compressed: propagation through blocks, refinement, healing, adapters."""

import importlib
from typing import Any

from tensornet_compress.compressing.propagate import BlockReport, Propagation, propagate
from tensornet_compress.compressing.refine import BlockRefinement
from tensornet_compress.errors import MissingExtraError
from tensornet_compress.train.heal import HealReport, heal, next_token_loss
from tensornet_compress.train.isvt import IsvtReport, isvt
from tensornet_compress.train.problem import Problem, curvature
from tensornet_compress.train.proximal import proximal_step
from tensornet_compress.train.reduction import Schedule
from tensornet_compress.train.stages import compress_in_stages
from tensornet_compress.train.state import IsvtStep

__all__ = [
    "BlockRefinement",
    "BlockReport",
    "HealReport",
    "IsvtReport",
    "IsvtStep",
    "Problem",
    "Propagation",
    "Schedule",
    "compress_in_stages",
    "curvature",
    "heal",
    "isvt",
    "next_token_loss",
    "propagate",
    "proximal_step",
]

# Public names whose code lies in the room `experimental`, above this one.
_EXPERIMENTAL = ("GradualReport", "reduce_gradually", "shrink_bonds", "threshold_bonds")


def __getattr__(name: str) -> Any:
    if name in ("lora", "merge_lora"):
        try:
            importlib.import_module("peft")
        except ImportError as error:
            told = f"adapters need the 'peft' extra ({error}); pip install 'tensornet-compress[peft]'"
            raise MissingExtraError(told) from error
        return getattr(importlib.import_module("tensornet_compress.train.adapters"), name)
    if name in _EXPERIMENTAL:
        return getattr(importlib.import_module("tensornet_compress.experimental"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
