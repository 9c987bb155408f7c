"""Fitting what was compressed: propagation through blocks, refinement, healing."""

from tensornet_compress.train.blocks import BlockRunner
from tensornet_compress.train.heal import HealReport, heal, next_token_loss
from tensornet_compress.train.isvt import IsvtReport, IsvtStep, isvt
from tensornet_compress.train.problem import Problem
from tensornet_compress.train.propagate import BlockReport, Propagation, propagate
from tensornet_compress.train.proximal import curvature, proximal_step
from tensornet_compress.train.refine import BlockRefinement
from tensornet_compress.train.schedule import Schedule

__all__ = [
    "BlockRefinement",
    "BlockReport",
    "BlockRunner",
    "HealReport",
    "IsvtReport",
    "IsvtStep",
    "Problem",
    "Propagation",
    "Schedule",
    "curvature",
    "heal",
    "isvt",
    "next_token_loss",
    "propagate",
    "proximal_step",
]
