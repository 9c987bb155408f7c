"""Integer codes and their scales improved in turns, in a metric.

Each code moves to the best one while all others stay (cyclic coordinate descent, QuantEase 2309.01885), then each scale (and
offset) to its least-squares value for the codes. The error falls on text that the moment was not measured on too, though less.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tensornet_compress.coding import IntFormat
from tensornet_compress.coding.floats import FLOAT_DTYPES

_BLOCK = 128
_MOST_CHANGE = 2.0


def improved_codes(
    matrix: Tensor, moment: Tensor, fmt: IntFormat, codes: Tensor, scale: Tensor, zero: Tensor, rounds: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes (rows, run), scales and zero points (rows, groups) whose squared error in ``moment`` (run, run) is for no row more
    than that of those given.

    ``zero`` is as decoded; integer zero points keep their integers.
    """
    if not rounds:
        return codes, scale, zero
    descent = _Descent(matrix, moment, fmt, codes, scale, zero)
    before = descent.objective()
    for _ in range(rounds):
        descent.improve_codes()
        descent.improve_scales()
    better = (descent.objective() < before)[:, None]
    return (
        torch.where(better, descent.codes.T.to(torch.uint8), codes),
        torch.where(better, descent.scale.T, scale),
        torch.where(better, descent.zero().T, zero),
    )


class _Descent:
    """The state, with columns of the matrix as rows, so that each step touches whole rows; ``slope`` is the moment times the
    error, kept up to date."""

    def __init__(self, matrix: Tensor, moment: Tensor, fmt: IntFormat, codes: Tensor, scale: Tensor, zero: Tensor):
        self.fmt, self.run, self.width = fmt, matrix.shape[1], fmt.width(matrix.shape[1])
        self.moment = moment.to(matrix.dtype)
        self.codes = codes.T.to(matrix.dtype).contiguous()
        self.scale = scale.T.contiguous().clone()
        self.has_offsets = fmt.zero == "float"
        # Integer zero points are kept as what is subtracted from codes, offsets as what is added to products.
        self.points = torch.zeros_like(self.scale) if self.has_offsets else (-zero / scale).round().T.contiguous()
        self.offsets = zero.T.contiguous().clone() if self.has_offsets else torch.zeros_like(self.scale)
        self.error = matrix.T - self._decoded()
        self.slope = self.moment @ self.error

    def objective(self) -> Tensor:
        """Squared error of each row of the matrix."""
        return (self.error.double() * (self.moment @ self.error).double()).sum(0)

    def zero(self) -> Tensor:
        """Zero points as decoded (groups, rows)."""
        return self.offsets - self.scale * self.points

    def _wide(self, per_group: Tensor) -> Tensor:
        return per_group.repeat_interleave(self.width, 0)[: self.run]

    def _decoded(self) -> Tensor:
        return self.codes * self._wide(self.scale) + self._wide(self.zero())

    def improve_codes(self) -> None:
        """Every code in turn, those of one column of the matrix at a time for all rows."""
        scales, zeros = self._wide(self.scale), self._wide(self.zero())
        for start in range(0, self.run, _BLOCK):
            end = min(start + _BLOCK, self.run)
            own = self.moment[start:end, start:end]
            slope, moved = self.slope[start:end].clone(), torch.empty_like(self.slope[start:end])
            for place in range(end - start):
                column, curvature = start + place, own[place, place]
                step = scales[column]
                decoded = torch.addcmul(zeros[column], self.codes[column], step)
                wanted = decoded.add_(slope[place] / curvature).sub_(zeros[column]).div_(step)
                code = wanted.round_().clamp_(0, self.fmt.levels)
                torch.mul(code - self.codes[column], step, out=moved[place])
                self.codes[column] = code
                slope.addr_(own[:, place], moved[place], alpha=-1)
            self._move(start, end, moved)

    def improve_scales(self) -> None:
        """Every scale in turn, jointly with its offset where there is one, rounded to what is stored."""
        for group in range(len(self.scale)):
            start, end = group * self.width, min((group + 1) * self.width, self.run)
            own, slope = self.moment[start:end, start:end], self.slope[start:end]
            directions = self.codes[start:end] - self.points[group]
            seen = own @ directions
            gain, curvature = (slope * directions).sum(0), (seen * directions).sum(0)
            if self.has_offsets:
                # Two unknowns: the offset is eliminated from the equation of the scale.
                shared, total, flat = seen.sum(0), own.sum(), slope.sum(0)
                gain, curvature = gain - shared * flat / total, curvature - shared.square() / total
            scale = self.scale[group]
            change = torch.where(curvature > 1e-6 * seen.mul(directions).sum(0), gain / curvature, 0.0)
            new = self._as_stored((scale + change).clamp(scale / _MOST_CHANGE, scale * _MOST_CHANGE), scale)
            moved = (new - scale) * directions
            if self.has_offsets:
                offset = self.offsets[group]
                lifted = self._as_stored(offset + (flat - (new - scale) * shared) / total, offset)
                moved += lifted - offset
                self.offsets[group] = lifted
            self.scale[group] = new
            self._move(start, end, moved)

    def _as_stored(self, wanted: Tensor, now: Tensor) -> Tensor:
        """Rounded to the dtype of scales; what that cannot hold, or makes zero of, stays as it is."""
        stored = wanted.to(FLOAT_DTYPES[self.fmt.scale_dtype]).to(wanted.dtype)
        return torch.where(torch.isfinite(stored) & ((stored != 0) | (now == 0)), stored, now)

    def _move(self, start: int, end: int, moved: Tensor) -> None:
        """Decoded columns have moved."""
        self.error[start:end] -= moved
        self.slope.addmm_(self.moment[:, start:end], moved, alpha=-1)
