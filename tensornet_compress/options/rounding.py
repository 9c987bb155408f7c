"""What rounding to a number format loses: one figure for each format, and finer models for the numbers at hand.

``rounding_error`` was compared with the errors of cores rounded to nearest, trains and trees of random, smooth and real tensors
(MiniLM, SmolLM2): it is 1.25 to 1.8 times what floats lose, and 0.65 to 1.7 times what integers lose on tensors without
structure (up to 3.4 times on smooth ones, whose cores are far from normal).
"""

from __future__ import annotations

from tensornet_compress.coding import IntFormat, NamedFormat, NumberFormat
from tensornet_compress.coding.packed_integers import grouped_view
from tensornet_compress.decompose import MatrixSpectrum
from tensornet_compress.options.layer import LayerStatistics

_FLOAT_ERRORS = {"fp32": 2.0**-50, "bf16": 2.0**-18, "fp16": 2.0**-24}
# Groups of 64 normal numbers span about this many standard deviations.
_SPAN = 5.0


def rounding_error(fmt: NamedFormat) -> float:
    """Squared rounding error relative to the squared numbers, for normal numbers."""
    return (_SPAN / fmt.levels) ** 2 / 12 if isinstance(fmt, IntFormat) else _FLOAT_ERRORS[fmt.dtype]


def dense_error(statistics: LayerStatistics, fmt: NumberFormat) -> float:
    """Of the weight as one core: predicted where error feedback will be used, else measured after rounding to nearest, which is
    cheap."""
    matrix, feedback = statistics.matrix, statistics.feedback
    if feedback is not None and isinstance(fmt, IntFormat) and feedback.applies(statistics.weight, fmt):
        return float(feedback.predicted_error(matrix, fmt) @ statistics.row_prices)
    rounded = fmt.decode(fmt.encode(statistics.weight.float()), tuple(statistics.weight.shape), matrix.dtype)
    return statistics.metric.norm2(matrix - rounded.reshape(matrix.shape))


def rounding_by_rank(statistics: LayerStatistics, fmt: IntFormat, spectrum: MatrixSpectrum, most: int) -> list[float]:
    """What rounding both of two cores adds at rank 0 .. ``most`` of a spectrum in the layer's metric: the right one with error
    feedback; columns of the left one are weighted by the spectrum, because ``V C V' = diag(sigma^2)``."""
    left, right = spectrum.cores(most)
    if statistics.feedback is None:
        right_errors = (fmt.fit_grid(right)[0].double().square() / 12).sum(1) * right.shape[1]
    elif statistics.feedback.applies(right, fmt):
        right_errors = statistics.feedback.predicted_error(right, fmt)
    else:
        right_errors = right.double().square().sum(1) * statistics.metric.mean_price
    rows, run = grouped_view(tuple(left.shape), fmt.group)
    steps = fmt.spread(fmt.fit_grid(left.reshape(rows, run))[0], run).reshape(left.shape).double().square() / 12
    per_rank = right_errors + (statistics.row_prices @ steps) * spectrum.squares[:most]
    return [0.0, *per_rank.cumsum(0).tolist()]
