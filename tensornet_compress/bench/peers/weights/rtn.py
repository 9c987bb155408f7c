"""Round to nearest in groups that share a scale and an offset."""

from __future__ import annotations

from torch import Tensor

from tensornet_compress.bench.peers.weights.grids import GROUPS, grid_for
from tensornet_compress.bench.weight_case import WEIGHT_METHODS, Approximation, WeightCase, WeightMethod, by_layer
from tensornet_compress.coding import parse_format
from tensornet_compress.nn import Target

CODES = {bits: float(bits) for bits in range(2, 9)}


def format_for(bits: float, columns: int) -> str:
    """The grid for a number of bits, as a format name: scales and offsets in fp16 of groups, or scales and integer zero points
    of whole rows of ``columns`` weights (the shortest rows of a model), where an offset would shift all small weights alike."""
    code, group = grid_for(bits, CODES, 32, (*GROUPS, max(columns, max(GROUPS))))
    return f"int{code}g{group}o" if group in GROUPS else f"int{code}g0z"


def round_weight(case: WeightCase, target: Target, matrix: Tensor, nbytes: int) -> Approximation:
    """Minimum to maximum of each group."""
    name = format_for(8 * nbytes / matrix.numel(), matrix.shape[1])
    fmt = parse_format(name)
    parts = fmt.encode(matrix)
    stored = {"codes": [parts["_q"]], "scales": [parts["_scale"]], "zero points": [parts["_zero"]]}
    return Approximation(fmt.decode(parts, tuple(matrix.shape), matrix.dtype), stored, "integers", name)


WEIGHT_METHODS.add(
    WeightMethod("rtn", by_layer(round_weight), explanation="round to nearest in groups, scale and offset in fp16")
)
