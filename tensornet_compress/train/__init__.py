"""Fitting what was compressed: propagation through blocks, refinement, healing."""

from tensornet_compress.train.blocks import BlockRunner
from tensornet_compress.train.heal import HealReport, heal, next_token_loss
from tensornet_compress.train.propagate import BlockReport, Propagation, propagate
from tensornet_compress.train.refine import BlockRefinement

__all__ = [
    "BlockRefinement",
    "BlockReport",
    "BlockRunner",
    "HealReport",
    "Propagation",
    "heal",
    "next_token_loss",
    "propagate",
]
