"""Sums of few Kronecker products in a matrix: the digits that fit best, and orders of rows and columns that come near one."""

from __future__ import annotations

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from tensornet_compress.decompose.linalg import gram_squares
from tensornet_compress.searching.limits import NEVER, Deadline
from tensornet_compress.searching.store import spectral_entropy

_ROUNDS = 40
_TRIAL_ROUNDS = 2
_LEAP = 0.01
_STANDS_OUT = 0.02
_SMALLEST_FACTOR = 16
_LARGEST_FACTOR = 1024
_SAMPLED = 8
_MANY = 1 << 18
_MANY_SPLITS = 100
_GLANCED = 64
_ROUNDING, _ROUNDING_SINGLE = 1e-6, 2e-3
Split = tuple[tuple[int, int], tuple[int, int]]
"""A high and a low radix for the rows, and for the columns."""


def best_split(matrix: Tensor, deadline: Deadline = NEVER) -> Split | None:
    """The cut whose rearranged matrix stands out most: its share of the energy less its share of the numbers, at least 2 %.

    Of large matrices spectra are estimated from a sample of the longer side. Where there are many cuts, only those whose
    sampled blocks stand out most are looked at as a whole. Once the deadline has passed it is the best of those seen."""
    best: tuple[float, Split] | None = None
    wide = matrix.double() if matrix.numel() <= _MANY else matrix.float()
    rounding = _ROUNDING if matrix.numel() <= _MANY else _ROUNDING_SINGLE
    for (a, b), (c, d) in _likely_splits(wide):
        if deadline.passed():
            break
        side = min(a * c, b * d)
        arranged = wide.reshape(a, b, c, d).permute(0, 2, 1, 3).reshape(a * c, b * d)
        arranged = arranged if a * c <= b * d else arranged.T
        if matrix.numel() > _MANY and arranged.shape[1] > _SAMPLED * side:
            drawn = torch.randperm(arranged.shape[1], generator=torch.Generator().manual_seed(0))[: _SAMPLED * side]
            arranged = arranged[:, drawn.to(arranged.device)]
        values = gram_squares(arranged).sqrt().cpu().numpy()
        score = _score(values, (arranged.shape[0], arranged.shape[1]), (a * c, b * d), rounding)
        if best is None or score > best[0]:
            best = score, ((a, b), (c, d))
    return None if best is None or best[0] <= _STANDS_OUT else best[1]


def _likely_splits(matrix: Tensor) -> list[Split]:
    """Cuts whose factors are neither too large to factorise nor too small to tell; of many those whose sampled blocks stand out
    most."""
    splits = []
    for (a, b), (c, d) in kronecker_splits((matrix.shape[0], matrix.shape[1])):
        side, length = sorted((a * c, b * d))
        if side <= _LARGEST_FACTOR and (side >= _SMALLEST_FACTOR or length <= _SMALLEST_FACTOR * side):
            splits.append(((a, b), (c, d)))
    if len(splits) <= _MANY_SPLITS:
        return splits
    draw = np.random.default_rng(0)
    scores = []
    for (a, b), (c, d) in splits:
        blocks = [draw.choice(size, min(size, _GLANCED), replace=False) for size in (a * c, b * d)]
        high, low = (np.divmod(block, width) for block, width in zip(blocks, (c, d)))
        rows = torch.from_numpy(high[0][:, None] * b + low[0]).to(matrix.device)
        columns = torch.from_numpy(high[1][:, None] * d + low[1]).to(matrix.device)
        block = matrix[rows, columns].cpu().double().numpy()
        # Of a matrix of rank r so is any block; what stands out of it is judged by its own numbers.
        scores.append(_score(np.linalg.svd(block, compute_uv=False), block.shape, block.shape, _ROUNDING))
    kept = sorted(np.argsort(-np.asarray(scores), kind="stable")[:_MANY_SPLITS].tolist())
    return [splits[place] for place in kept]


def kronecker_splits(shape: tuple[int, int]) -> list[Split]:
    """All ways to cut rows and columns in a high and a low digit, both at least 2."""

    def cuts(size: int) -> list[tuple[int, int]]:
        return [(size // low, low) for low in range(2, size // 2 + 1) if size % low == 0]

    return [(rows, columns) for rows in cuts(shape[0]) for columns in cuts(shape[1])]


def _score(values: np.ndarray, shape: tuple[int, int], whole: tuple[int, int], rounding: float) -> float:
    """Share of the energy of a matrix of ``shape`` that stands out, less that of the numbers which the ``whole`` takes."""
    rank = standing_out(values, shape, rounding)
    explained = float((values[:rank] ** 2).sum()) / max(float((values**2).sum()), 1e-300)
    return explained - rank * sum(whole) / (whole[0] * whole[1])


def standing_out(values: np.ndarray, shape: tuple[int, int], rounding: float = _ROUNDING) -> int:
    """How many singular values of a matrix of ``shape`` stand out of noise of unknown level (Gavish & Donoho 1305.5870), at
    least 1; below a share ``rounding`` of the largest there is nothing but that of a Gram matrix."""
    ratio = min(shape) / max(shape)
    threshold = (0.56 * ratio**3 - 0.95 * ratio**2 + 1.82 * ratio + 1.43) * float(np.median(values))
    return max(1, int((values > max(threshold, rounding * float(values[0]))).sum()))


def assigned(matrix: Tensor, radices: Split, deadline: Deadline = NEVER) -> tuple[list[int], list[int]]:
    """Row and column orders under which a matrix is closest to a sum of few Kronecker products.

    Alternates a fit (truncated SVD of the rearranged matrix) with a linear assignment of rows, then of columns, to those of
    the fit, once for every rank up to what stands out of the noise: fits of too high a rank repeat the wrong places they were
    fitted to. The order of least entropy of the rearranged spectrum wins. It repairs orders that are partly right; a full
    scramble needs a better start (see ``seriation``).
    """
    target = matrix.double().cpu().numpy()
    native = np.arange(len(target)), np.arange(target.shape[1])
    arranged = _arranged(target, radices)
    values = _values(arranged)
    most = standing_out(values, arranged.shape)
    best = (spectral_entropy(values), native)
    for rank in sorted({1 << power for power in range(most.bit_length())} | {most}):
        if deadline.passed():
            break
        rows, columns = _alternate(target, radices, rank, deadline)
        entropy = spectral_entropy(_values(_arranged(target[np.ix_(rows, columns)], radices)))
        if entropy < best[0] - 1e-9:
            best = entropy, (rows, columns)
    return best[1][0].tolist(), best[1][1].tolist()


def _alternate(target: np.ndarray, radices: Split, rank: int, deadline: Deadline) -> tuple[np.ndarray, np.ndarray]:
    rows, columns = np.arange(len(target)), np.arange(target.shape[1])
    total, first = float((target**2).sum()), 0.0
    for number in range(_ROUNDS):
        fit = _kronecker_fit(target[np.ix_(rows, columns)], radices, rank)
        share = float((fit**2).sum()) / max(total, 1e-300)
        first = first or share
        # Orders that are partly right are put right in leaps; on what has no such order every round gains next to nothing.
        if deadline.passed() or (number >= _TRIAL_ROUNDS and share - first < _LEAP):
            break
        new_rows = _assign(target[:, columns], fit)
        fit = _kronecker_fit(target[np.ix_(new_rows, columns)], radices, rank)
        new_columns = _assign(target[new_rows].T, fit.T)
        if np.array_equal(new_rows, rows) and np.array_equal(new_columns, columns):
            break
        rows, columns = new_rows, new_columns
    return rows, columns


def _arranged(matrix: np.ndarray, radices: Split) -> np.ndarray:
    """Rows: high digits of both axes; columns: low digits (Van Loan's rearrangement)."""
    (a, b), (c, d) = radices
    return np.asarray(matrix.reshape(a, b, c, d).transpose(0, 2, 1, 3).reshape(a * c, b * d))


def _values(arranged: np.ndarray) -> np.ndarray:
    """Singular values, descending."""
    return np.asarray(gram_squares(torch.from_numpy(arranged)).sqrt())


def _kronecker_fit(matrix: np.ndarray, radices: Split, rank: int) -> np.ndarray:
    (a, b), (c, d) = radices
    arranged = _arranged(matrix, radices)
    short = arranged if len(arranged) <= arranged.shape[1] else arranged.T
    basis = np.linalg.eigh(short @ short.T)[1][:, -rank:]
    fit = basis @ (basis.T @ short)
    fit = fit if short is arranged else fit.T
    return np.asarray(fit.reshape(a, c, b, d).transpose(0, 2, 1, 3).reshape(matrix.shape))


def _assign(items: np.ndarray, places: np.ndarray) -> np.ndarray:
    """``order`` so that ``items[order]`` is nearest to ``places``."""
    cost = (places**2).sum(1)[:, None] - 2 * places @ items.T + (items**2).sum(1)
    return np.asarray(linear_sum_assignment(cost)[1])
