"""Rounding a core to integers with error feedback in a metric.

GPTQ (2210.17323): columns are rounded one by one and each column's error is spread over the columns not yet rounded so that
the loss in the metric grows least. Grids are fixed beforehand, which lets columns be taken in order of falling importance
without storing an index per column. Codes and scales are then improved in turns (``code_descent``).
"""

from __future__ import annotations

from math import log2

import torch
from torch import Tensor

from tensornet_compress.coding import IntFormat, NumberFormat
from tensornet_compress.coding.packed_integers import grouped_view
from tensornet_compress.decompose.code_descent import improved_codes

_BLOCK = 128
ROUNDS = 2
# Measured over predicted errors on SmolLM2's layers: with few levels grids are clipped and errors are no longer uniform, and
# what feedback adds to a number may leave a grid that is fixed for a long group.
_CLIPPING_INFLATION = {2: 1.3, 3: 1.05}
_LONG_INFLATION = 0.05
_SHORT, _FEW_BITS = 64, 2
# Squared distance to the grid, over that of numbers anywhere between its points, which single precision may leave.
_ON_GRID = 1e-8


class ErrorFeedback:
    """What rounding needs to know of one second moment (run, run): factorised once, good for every core and format."""

    def __init__(self, moment: Tensor, damping: float = 0.01, rounds: int = ROUNDS):
        """``moment`` is of what the cores are multiplied with along their last axis; ``damping`` is relative to its mean
        diagonal; ``rounds``: how often codes and scales are improved after rounding."""
        moment = moment.double()
        level = float(moment.diagonal().mean())
        damped = moment + damping * level * torch.eye(len(moment), dtype=moment.dtype, device=moment.device)
        self.rounds, self._damped = rounds, damped.float()
        self.importance = moment.diagonal().clamp_min(1e-6 * level)
        self.order = self.importance.argsort(descending=True, stable=True)
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped[self.order][:, self.order]))
        self._upper = torch.linalg.cholesky(inverse, upper=True)
        self.pivots = self._upper.diagonal().square().reciprocal()

    def encode(self, core: Tensor, fmt: NumberFormat) -> dict[str, Tensor]:
        """Stored parts of ``core`` (rows, run) in ``fmt``. Float formats, and cores whose groups do not run along the last
        axis, are rounded to nearest."""
        if not isinstance(fmt, IntFormat) or not self.applies(core, fmt):
            return fmt.encode(core)
        matrix = core.float()
        scale, zero = fmt.fit_grid(matrix, self.importance)
        codes = self._codes(matrix, fmt, scale, zero)
        return fmt.assemble(*improved_codes(matrix, self._damped, fmt, codes, scale, zero, self.rounds))

    def applies(self, core: Tensor, fmt: NumberFormat) -> bool:
        """Whether groups of ``fmt`` run along the axis that the moment speaks of."""
        return isinstance(fmt, IntFormat) and core.ndim == 2 and grouped_view(tuple(core.shape), fmt.group) == tuple(core.shape)

    def predicted_error(self, core: Tensor, fmt: IntFormat) -> Tensor:
        """Expected squared error in the metric of each row (rows,), without feedback being run: a rounding error is uniform
        over its step, and the pivot of its column is what it costs after feedback. Rows that lie on their grid already (of a
        checkpoint that was quantised before) cost nothing."""
        matrix, run = core.float(), core.shape[1]
        scale, zero = fmt.fit_grid(matrix, self.importance)
        steps = fmt.spread(scale, run).double().square() / 12
        pivots = torch.empty_like(self.pivots)
        pivots[self.order] = self.pivots
        longer = max(0.0, log2(fmt.width(run) / _SHORT)) if fmt.bits > _FEW_BITS else 0.0
        inflation = _CLIPPING_INFLATION.get(fmt.bits, 1.0) * (1 + _LONG_INFLATION * longer)
        rounded = fmt.quantise(matrix, scale, zero) * fmt.spread(scale, run) + fmt.spread(zero, run)
        on_grid = (matrix - rounded).double().square().sum(1) <= _ON_GRID * steps.sum(1)
        return torch.where(on_grid, 0.0, inflation * steps @ pivots)

    def _codes(self, matrix: Tensor, fmt: IntFormat, scale: Tensor, zero: Tensor) -> Tensor:
        run = matrix.shape[1]
        upper = self._upper.to(matrix.dtype)
        # Column-major work: each step touches whole columns.
        work = matrix.T[self.order].contiguous()
        scales = fmt.spread(scale, run).T[self.order].contiguous()
        zeros = fmt.spread(zero, run).T[self.order].contiguous()
        codes = torch.empty_like(work)
        for start in range(0, run, _BLOCK):
            end = min(start + _BLOCK, run)
            errors = torch.empty_like(work[start:end])
            for column in range(start, end):
                code = ((work[column] - zeros[column]) / scales[column]).round_().clamp_(0, fmt.levels)
                codes[column] = code
                error = (work[column] - (code * scales[column] + zeros[column])) / upper[column, column]
                work[column + 1 : end].addr_(upper[column, column + 1 : end], error, alpha=-1)
                errors[column - start] = error
            work[end:].addmm_(upper[start:end, end:].T, errors, alpha=-1)
        natural = torch.empty_like(codes)
        natural[self.order] = codes
        return natural.T.to(torch.uint8)
