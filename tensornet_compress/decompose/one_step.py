"""One quantisation step in the Fisher metric: codes of a matrix whose errors cost the same wherever they fall.

An error ``E`` of a layer's weights costs ``1/2 sum_r g_r E_r C E_r'`` nats a token, with C the second moment of the inputs and
g_r the Fisher information of output r. Columns are rounded one after the other and the rest is fitted to what was lost (GPTQ,
2210.17323: successive cancellation). With ``C^-1 = U'U``, U upper triangular, the errors that are left are white in units of
``U_ii / sqrt(g_r)``; so at high rates the best step of entry (r, i) is

    ``step U_ii / sqrt(g_r)``

with a single number ``step`` for all layers of a model, and the entropy of the codes is the rate. Every row, column and layer
gets its bits by that (reverse water-filling). One entry costs ``step^2 / 24`` nats.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite, log

import numpy as np
import torch
from numba import njit
from torch import Tensor

from tensornet_compress.coding import CodedFormat, trellis
from tensornet_compress.coding.coded_integers import scale_bits
from tensornet_compress.coding.coded_matrix import MAGNITUDES_PER_OCTAVE, STEPS_PER_OCTAVE, CodedMatrix, step_sizes
from tensornet_compress.coding.laws import HALF
from tensornet_compress.decompose.lapack import inverse_root
from tensornet_compress.errors import TensorNetError
from tensornet_compress.memory import release, trim
from tensornet_compress.metric import KroneckerMetric
from tensornet_compress.tensor import NetworkSpec
from tensornet_compress.threads import leave_if_stopped

NATS_PER_ENTRY = 1 / 24
"""Divergence per token of one entry at high rates, in squared steps."""
SLOPE = 2 * log(2) / 12
"""What a bit is worth at high rates: squared error, in squared steps, that a further bit per entry saves."""
_DAMPING = 0.01
_LEAST_ROW = 0.05
_BLOCK = 64
# Entries of a matrix that are looked at together, beyond what is coded.
_STRIP = 1 << 22
# Rows of a matrix whose columns are copied together: a cache line of each.
_TILE = 16
_LEAST_ROWS = 16
# Rounded codes are larger than foretold by weights alone, as they take over errors of columns before them.
_TYPICAL = 1.25
_INT16 = (1 << 15) - 1
_MOST_CODE_BITS = 22
"""Below the precision of float32 weights, which finer steps, of layers that matter far more than the rest, would not see."""


@dataclass
class Canceller:
    """Successive cancellation in one metric: its factors are computed once and serve every step and every matrix of a layer."""

    order: Tensor
    """Columns as they are visited, those of largest second moment first, int64 (n,)."""
    deviations: Tensor
    """``U_ii`` in that order, float64 (n,)."""
    coupling: Tensor
    """``U_ij / U_ii``: how an error of column i changes those after it, float32 (n, n) upper triangular."""
    ridge: float
    """What was added to the diagonal of the moment."""

    @classmethod
    def of(cls, columns: Tensor | None, n: int, damping: float = _DAMPING) -> Canceller:
        """From the second moment of the inputs, (n, n), its diagonal (n,), or none (Euclidean).

        ``damping``: share of the mean diagonal that is added to it, so that directions that no input took stay near.
        """
        moment = torch.ones(n) if columns is None else columns
        diagonal = (moment if moment.ndim == 1 else moment.diagonal()).double()
        level = float(diagonal.sum()) / max(n, 1)
        if not isfinite(level):
            raise TensorNetError("the second moment of a layer's inputs is not finite; calibrate it on finite inputs")
        if n and not level > 0:
            return cls.of(None, n)
        order = torch.argsort(diagonal, descending=True, stable=True)
        if moment.ndim == 1:
            return cls(order, (diagonal[order] + damping * level).rsqrt(), torch.zeros(0, 0), damping * level)
        # C = R R' with R upper triangular, by the Cholesky factor of C read backwards; then U = R^-1. These matrices are large:
        # none is kept longer than it must be.
        backwards = moment[order.flip(0)][:, order.flip(0)].double().div_(level)
        backwards.diagonal().add_(damping)
        try:
            inverse = torch.from_numpy(inverse_root(backwards.contiguous().numpy())).flip(0, 1).triu_()
        except TensorNetError as error:
            raise TensorNetError(f"the second moment of a layer's inputs: {error}; calibrate it on finite inputs") from error
        del backwards
        deviations = inverse.diagonal().clone()
        return cls(order, deviations / level**0.5, inverse.div_(deviations[:, None]).float(), damping * level)

    def codes(
        self, matrix: Tensor, row_weight: Tensor | None, step: float, slope: float = SLOPE, states: int = 0
    ) -> CodedMatrix:
        """Codes of ``matrix`` (m, n) at ``step``.

        Args:
            row_weight: Fisher information of each output, (m,), all positive; ones without it.
            slope: squared error in squared steps for which a bit is given up: of two neighbouring codes the smaller is taken
                where it saves enough. 0 rounds to nearest.
            states: 8 lets two quantisers take turns down each column (``coding/trellis.py``), where that is long enough.
        """
        return self._cancelled(matrix, row_weight, step, slope, states, None)

    def codes_and_losses(
        self, matrix: Tensor, row_weight: Tensor | None, step: float, slope: float = SLOPE, states: int = 0
    ) -> tuple[CodedMatrix, Tensor]:
        """``codes``, and what they lose of each row in the metric, ``E_r C E_r'``, float64 (m,).

        Errors ``E = z U``, as cancellation leaves them, have ``E (C + ridge) E' = z z'``: no product with C is needed.
        """
        losses = torch.zeros(len(matrix), dtype=torch.float64)
        coded = self._cancelled(matrix, row_weight, step, slope, states, losses)
        error = matrix - torch.from_numpy(coded.to_dense())
        return coded, (losses - self.ridge * error.square().sum(1, dtype=torch.float64)).clamp_min_(0)

    def _cancelled(
        self, matrix: Tensor, row_weight: Tensor | None, step: float, slope: float, states: int, losses: Tensor | None
    ) -> CodedMatrix:
        """Codes; to ``losses`` (m,) the squares of ``z`` are added up, by row."""
        rows, n = matrix.shape
        states = states if rows >= _LEAST_ROWS else 0
        weight = torch.ones(rows) if row_weight is None else row_weight
        row_step = _exponents(weight.double().rsqrt(), STEPS_PER_OCTAVE)
        column_step = _exponents((trellis.GRID if states else 1.0) * step * self.deviations, STEPS_PER_OCTAVE)
        column_size = step_sizes(column_step)
        largest, in_row, in_column = self._sizes(matrix, column_size)
        if not isfinite(float(largest.sum())):
            raise TensorNetError(f"a matrix {tuple(matrix.shape)} to be coded is not finite, or too large for single precision")
        row_step = np.maximum(row_step, _exponents(largest / 2.0**_MOST_CODE_BITS, STEPS_PER_OCTAVE))
        row_size = step_sizes(row_step)
        row_scale = _exponents(in_row / torch.from_numpy(row_size), MAGNITUDES_PER_OCTAVE)
        column_scale = _exponents(_TYPICAL * in_column / torch.from_numpy(column_size), MAGNITUDES_PER_OCTAVE)
        # Levels of a trellis are half as large as its codes.
        column_scale = column_scale - (MAGNITUDES_PER_OCTAVE if states else 0)
        row_scale, column_scale = _within_reach(row_scale, column_scale)
        lowest = int(row_scale.min()) + int(column_scale.min())
        row_class, column_class = row_scale - row_scale.min(), column_scale - column_scale.min()
        kinds = int(row_class.max()) + int(column_class.max()) + 1
        bits = slope * scale_bits(lowest, kinds)
        if states:
            bits = np.stack([bits, slope * scale_bits(lowest, kinds, odd=True)]) / trellis.GRID**2
        # Nearly all matrices have small codes, and what is left to code stands beside them.
        codes, order = np.empty((rows, n), np.int16), self.order.numpy()
        coupled = len(self.coupling) > 0
        # Columns are worked on as contiguous rows. Without coupling none waits for another, nor is copied before its turn.
        work = torch.empty(n, rows) if coupled else torch.zeros(0, 0)
        if coupled:
            strip = max(1, _STRIP // max(n, 1))
            for first in range(0, rows, strip):
                part = matrix[first : first + strip]
                _gather(part.float().numpy(), order, work[:, first : first + strip].numpy())
                release(part)
        block = work
        for start in range(0, n, _BLOCK):
            leave_if_stopped()
            stop = min(n, start + _BLOCK)
            now = self.order[start:stop]
            block = work[start:stop] if coupled else matrix.T[now].float().contiguous()
            found = np.empty((stop - start, rows), np.int32)
            coupling = self.coupling[start:stop, start:stop] if coupled else self.coupling
            (_cancel_in_trellis if states else _cancel)(
                block.numpy(),
                coupling.contiguous().numpy(),
                row_size.astype(np.float32),
                column_size[start:stop].astype(np.float32),
                row_class,
                column_class[start:stop],
                bits,
                found,
            )
            if codes.dtype == np.int16 and np.abs(found).max(initial=0) > _INT16:
                codes = codes.astype(np.int32)
            _scatter(found, order[start:stop], codes)
            if losses is not None:
                losses += (block / self.deviations[start:stop, None].float()).square_().sum(0)
            if stop < n and coupled:
                work[stop:].addmm_(self.coupling[start:stop, stop:].T, block, alpha=-1)
        del work, block
        back = torch.argsort(self.order).numpy()
        return CodedMatrix(
            codes.astype(np.int32, copy=False), row_step, column_step[back], row_scale, column_scale[back], states
        )

    def _sizes(self, matrix: Tensor, column_size: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
        """Of each row the largest magnitude in column steps and the mean magnitude, (m,), and of each column, in its turn, the
        mean magnitude in units of those of rows, (n,); float64, some rows at a time."""
        steps = torch.from_numpy(column_size).float()
        largest, in_row, in_column = [], [], torch.zeros(len(steps), dtype=torch.float64)
        for part in matrix.split(max(1, _STRIP // len(steps))):
            magnitude = part[:, self.order].float()
            magnitude.abs_()
            in_row.append(magnitude.mean(1).double().clamp_min(1e-30))
            in_column += magnitude.double().div_(in_row[-1][:, None]).mean(0) * (len(part) / len(matrix))
            largest.append(magnitude.div_(steps).amax(1).double())
            release(part)
        _tidy(matrix)
        return torch.cat(largest).clamp_min(1e-30), torch.cat(in_row), in_column.clamp_min(1e-30)


def row_weights(metric: KroneckerMetric, rows: int, least: float = _LEAST_ROW) -> Tensor:
    """Fisher information of each output, float64 (rows,), floored so that no output is given up.

    A metric that knows nothing of the loss (``rate`` None) weighs a unit of squared error as one nat.
    """
    level = 2.0 if metric.rate is None else 2 * metric.rate
    if metric.rows is None:
        return torch.full((rows,), level, dtype=torch.float64)
    weight = (metric.rows if metric.rows.ndim == 1 else metric.rows.diagonal()).double()
    return level * weight.clamp_min(max(least, 1e-12) * float(weight.mean()))


def is_coded(spec: NetworkSpec) -> bool:
    """Whether a spec is one core of entropy-coded integers."""
    return spec.is_dense and isinstance(spec.terms[0].formats[0], CodedFormat)


def one_step_parts(
    matrix: Tensor,
    fmt: CodedFormat,
    metric: KroneckerMetric,
    canceller: Canceller | None = None,
    damping: float = _DAMPING,
    least: float = _LEAST_ROW,
) -> dict[str, Tensor]:
    """Stored parts of a matrix (m, n) at the step of a format; ``damping`` and ``least``: shares of the mean that every column
    and row counts at least."""
    canceller = canceller or Canceller.of(metric.columns, matrix.shape[1], damping)
    codes = canceller.codes(matrix, row_weights(metric, len(matrix), least), fmt.step, states=fmt.states)
    # Coding takes as much memory again as codes do.
    release(matrix)
    parts = fmt.assemble(codes)
    del codes
    _tidy(matrix)
    return parts


def _tidy(matrix: Tensor) -> None:
    """Give back what was freed around a large matrix."""
    if matrix.numel() > _STRIP:
        trim()


def _exponents(values: Tensor, per_octave: int) -> np.ndarray:
    return torch.round(per_octave * values.double().log2()).to(torch.int32).numpy()


def _within_reach(row_scale: np.ndarray, column_scale: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scales without outliers far below the rest: a row of zeros needs no class of its own."""
    return (
        np.maximum(row_scale, int(np.median(row_scale)) - 64).clip(max=int(np.median(row_scale)) + 128),
        np.maximum(column_scale, int(np.median(column_scale)) - 64).clip(max=int(np.median(column_scale)) + 128),
    )


@njit(cache=True, nogil=True)
def _gather(matrix, order, columns):  # type: ignore[no-untyped-def]
    """Columns of a matrix (rows, n) in an order, as rows (n, rows)."""
    for first in range(0, len(matrix), _TILE):
        last = min(first + _TILE, len(matrix))
        for i in range(len(order)):
            for r in range(first, last):
                columns[i, r] = matrix[r, order[i]]


@njit(cache=True, nogil=True)
def _scatter(columns, order, matrix):  # type: ignore[no-untyped-def]
    """Put rows (k, rows) where they belong as columns of a matrix (rows, n)."""
    for r in range(len(matrix)):
        for i in range(len(order)):
            matrix[r, order[i]] = columns[i, r]


@njit(cache=True, nogil=True)
def _catch_up(block, coupling, i):  # type: ignore[no-untyped-def]
    """Take over into column i what was lost of the columns before it, four at a time."""
    for j in range(0, i - 3, 4):
        c0, c1, c2, c3 = coupling[j, i], coupling[j + 1, i], coupling[j + 2, i], coupling[j + 3, i]
        for r in range(block.shape[1]):
            block[i, r] -= c0 * block[j, r] + c1 * block[j + 1, r] + c2 * block[j + 2, r] + c3 * block[j + 3, r]
    for j in range(i - i % 4, i):
        for r in range(block.shape[1]):
            block[i, r] -= coupling[j, i] * block[j, r]


@njit(cache=True, nogil=True)
def _cancel(block, coupling, row_size, column_size, row_class, column_class, bits, codes):  # type: ignore[no-untyped-def]
    """Round a block of columns (columns, rows) one after the other; ``block`` then holds what was lost of each."""
    for i in range(len(block)):
        if len(coupling):
            _catch_up(block, coupling, i)
        for r in range(block.shape[1]):
            size = row_size[r] * column_size[i]
            value = block[i, r] / size
            code = np.rint(value)
            magnitude = abs(code)
            if 1 <= magnitude <= HALF:
                smaller = code - 1 if code > 0 else code + 1
                kind = row_class[r] + column_class[i]
                saved = bits[kind, int(magnitude)] - bits[kind, int(magnitude) - 1]
                if (value - smaller) ** 2 - (value - code) ** 2 < saved:
                    code = smaller
            codes[i, r] = int(code)
            block[i, r] -= np.float32(code * size)


@njit(cache=True, nogil=True)
def _cancel_in_trellis(block, coupling, row_size, column_size, row_class, column_class, bits, codes):  # type: ignore[no-untyped-def]
    """As ``_cancel``, each column along the best path of a trellis: rows know nothing of each other's errors."""
    for i in range(len(block)):
        if len(coupling):
            _catch_up(block, coupling, i)
        size = row_size * column_size[i]
        trellis.best_path(block[i] / size, row_class + column_class[i], bits, codes[i])
        for r in range(block.shape[1]):
            block[i, r] -= np.float32(codes[i, r] * size[r])
