"""Running a model under hooks: batches, blocks, statistics and divergence."""

from tensornet_compress.calibrate.batches import (
    Batch,
    check_calibration,
    check_vocabulary,
    kept_output,
    model_inputs,
    token_count,
)
from tensornet_compress.calibrate.blocks import BlockRunner
from tensornet_compress.calibrate.by_blocks import statistics_by_block
from tensornet_compress.calibrate.collect import Loss, collect_statistics
from tensornet_compress.calibrate.divergence import Reference, kl_divergence, output_divergence, sampled_loss, total_divergence
from tensornet_compress.calibrate.statistics import GradientStatistics, InputMoment

__all__ = [
    "Batch",
    "BlockRunner",
    "GradientStatistics",
    "InputMoment",
    "Loss",
    "Reference",
    "check_calibration",
    "check_vocabulary",
    "collect_statistics",
    "kept_output",
    "kl_divergence",
    "model_inputs",
    "output_divergence",
    "sampled_loss",
    "statistics_by_block",
    "token_count",
    "total_divergence",
]
