"""Fitting what was compressed: propagation through blocks, refinement, healing."""

from tensornet_compress.train.blocks import BlockRunner
from tensornet_compress.train.bonds import shrink_bonds, threshold_bonds
from tensornet_compress.train.gradual import GradualReport, reduce_gradually
from tensornet_compress.train.heal import HealReport, heal, next_token_loss
from tensornet_compress.train.isvt import IsvtReport, IsvtStep, isvt
from tensornet_compress.train.problem import Problem
from tensornet_compress.train.propagate import BlockReport, Propagation, propagate
from tensornet_compress.train.proximal import curvature, proximal_step
from tensornet_compress.train.refine import BlockRefinement
from tensornet_compress.train.schedule import Schedule
from tensornet_compress.train.stages import compress_in_stages

__all__ = [
    "BlockRefinement",
    "BlockReport",
    "BlockRunner",
    "GradualReport",
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
    "reduce_gradually",
    "shrink_bonds",
    "threshold_bonds",
]
