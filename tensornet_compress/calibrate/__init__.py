"""Running a model under hooks: batches, blocks, statistics, divergence and sensitivities."""

from tensornet_compress.calibrate.block_runner import BlockRunner
from tensornet_compress.calibrate.by_blocks import block_passes, statistics_by_block
from tensornet_compress.calibrate.collect import collect_statistics
from tensornet_compress.calibrate.divergence import kl_divergence, output_divergence, token_divergence
from tensornet_compress.calibrate.fisher import fisher_sensitivity
from tensornet_compress.calibrate.marginal import OperatingPoint
from tensornet_compress.calibrate.moments import (
    Batch,
    InputMoment,
    collect_input_moments,
    has_input_moment,
    model_inputs,
    require_unchanged,
    version_of,
    weight_users,
)
from tensornet_compress.calibrate.outputs import graph_start, kept_output, sampled_loss
from tensornet_compress.calibrate.sensitivity import first_tokens, measure_sensitivity
from tensornet_compress.calibrate.statistics import GradientStatistics

__all__ = [
    "Batch",
    "BlockRunner",
    "GradientStatistics",
    "InputMoment",
    "OperatingPoint",
    "block_passes",
    "collect_input_moments",
    "collect_statistics",
    "first_tokens",
    "fisher_sensitivity",
    "graph_start",
    "has_input_moment",
    "kept_output",
    "kl_divergence",
    "measure_sensitivity",
    "model_inputs",
    "output_divergence",
    "require_unchanged",
    "sampled_loss",
    "statistics_by_block",
    "token_divergence",
    "version_of",
    "weight_users",
]
