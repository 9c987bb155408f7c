"""Rounding a core to integers with error feedback in a metric.

GPTQ (2210.17323): columns are rounded one by one and each column's error is spread over the columns not yet rounded so that
the loss in the metric grows least. Grids are fixed beforehand, which lets columns be taken in order of falling importance
without storing an index per column.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tensornet_compress.network import IntFormat, NumberFormat
from tensornet_compress.network.formats import grouped_view

_BLOCK = 128
# With few levels grids are clipped and errors are no longer uniform: measured over predicted error on SmolLM2's layers.
_CLIPPING_INFLATION = {2: 1.4, 3: 1.15}


class ErrorFeedback:
    """What rounding needs to know of one second moment (run, run): factorised once, good for every core and format."""

    def __init__(self, moment: Tensor, damping: float = 0.01):
        """``moment`` is of what the cores are multiplied with along their last axis; ``damping`` is relative to its mean
        diagonal."""
        moment = moment.double()
        level = float(moment.diagonal().mean())
        damped = moment + damping * level * torch.eye(len(moment), dtype=moment.dtype, device=moment.device)
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
        return fmt.assemble(self._codes(matrix, fmt, scale, zero), scale, zero)

    def applies(self, core: Tensor, fmt: NumberFormat) -> bool:
        """Whether groups of ``fmt`` run along the axis that the moment speaks of."""
        return isinstance(fmt, IntFormat) and core.ndim == 2 and grouped_view(tuple(core.shape), fmt.group) == tuple(core.shape)

    def predicted_error(self, core: Tensor, fmt: IntFormat) -> Tensor:
        """Expected squared error in the metric of each row (rows,), without rounding: a rounding error is uniform over its
        step, and the pivot of its column is what it costs after feedback."""
        run = core.shape[1]
        scale, _ = fmt.fit_grid(core.float(), self.importance)
        pivots = torch.empty_like(self.pivots)
        pivots[self.order] = self.pivots
        inflation = _CLIPPING_INFLATION.get(fmt.bits, 1.0)
        return inflation * (fmt.spread(scale, run).double().square() / 12) @ pivots

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
