"""Orders of the fibres of an axis: starts from distances (spectral, path) and refinement by linear assignment against a fit."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from scipy.sparse import csc_array
from scipy.sparse.csgraph import connected_components, laplacian
from scipy.sparse.linalg import eigsh
from torch import Tensor

from tensornet_compress.searching.smooth import smooth_fibres
from tensornet_compress.tensor import FibreOrder

_NEIGHBOURS = 8
_PASSES = 60
_DENSE_GRAPH = 1500
_SHIFT = 1e-3
_ROUNDS = 40
_TRIAL_ROUNDS = 2
_LEAP = 0.01
_NEAR = 0.6
_STANDS_OUT = 0.02
_SMALLEST_FACTOR = 16
_LARGEST_FACTOR = 1024
_SAMPLED = 8
_MANY = 1 << 18
_MANY_SPLITS = 100
_GLANCED = 64
_ROUNDING, _ROUNDING_SINGLE = 1e-6, 2e-3
Alive = Callable[[], bool]
"""False once the time is up."""
Split = tuple[tuple[int, int], tuple[int, int]]
"""A high and a low radix for the rows, and for the columns."""


def squared_distances(tensor: Tensor, axis: int) -> np.ndarray:
    """Squared Euclidean distances between the fibres of an axis, float64 (n, n)."""
    rows = tensor.movedim(axis, 0).flatten(1).double()
    gram = rows @ rows.T
    norms = gram.diagonal()
    return np.asarray((norms[:, None] + norms - 2 * gram).clamp_min(0).cpu())


def spectral_fibres(distances: np.ndarray) -> list[int]:
    """The Fiedler order of the graph of nearest fibres, component by component (Atkins, Boman & Hendrickson 1998)."""
    count = len(distances)
    if count < 4:
        return list(range(count))
    nearest = np.sort(distances, 1)[:, 1 : 1 + min(_NEIGHBOURS, count - 1)]
    scale = np.maximum(nearest.mean(1), 1e-12 * max(float(distances.max()), 1e-100))
    weights = np.exp(-distances / np.sqrt(scale[:, None] * scale))
    weights[distances > np.maximum(nearest[:, -1:], nearest[:, -1])] = 0.0
    np.fill_diagonal(weights, 0.0)
    order: list[int] = []
    parts, labels = connected_components(weights > 0, directed=False)
    for part in range(parts):
        members = np.flatnonzero(labels == part)
        if len(members) < 3:
            order += members.tolist()
            continue
        order += members[np.argsort(_fiedler(weights[np.ix_(members, members)]), kind="stable")].tolist()
    return order


def _fiedler(weights: np.ndarray) -> np.ndarray:
    graph = np.asarray(laplacian(weights, normed=True))
    if len(graph) <= _DENSE_GRAPH:
        return np.asarray(np.linalg.eigh(graph)[1][:, 1])
    values, vectors = eigsh(csc_array(graph), k=2, sigma=-_SHIFT, v0=np.linspace(0.5, 1.5, len(graph)))
    return np.asarray(vectors[:, int(values.argmax())])


def path_fibres(distances: np.ndarray, start: Sequence[int], alive: Alive = lambda: True) -> list[int]:
    """A short path through all fibres: the shorter of ``start`` and the greedy path, improved by reversals (2-opt) while
    ``alive``."""
    lengths = np.sqrt(distances)
    candidates = [np.asarray(start), _greedy_path(lengths)]
    order = min(candidates, key=lambda path: float(lengths[path[:-1], path[1:]].sum()))
    return _without_crossings(lengths, order, alive).tolist()


def _greedy_path(lengths: np.ndarray) -> np.ndarray:
    """From one end of the longest distance always to the nearest fibre left."""
    count = len(lengths)
    left = np.ones(count, bool)
    path = [int(np.unravel_index(int(lengths.argmax()), lengths.shape)[0])]
    for _ in range(count - 1):
        left[path[-1]] = False
        path.append(int(np.where(left, lengths[path[-1]], np.inf).argmin()))
    return np.asarray(path)


def _without_crossings(lengths: np.ndarray, order: np.ndarray, alive: Alive) -> np.ndarray:
    """2-opt of an open path: from each place in turn the best reversal, until a pass over all places changes nothing. A fibre
    at no distance from all others stands for the start and for the end."""
    count = len(order)
    lengths = np.pad(lengths, (0, 1))
    order = np.concatenate([[count], order, [count]])
    least = 1e-9 * max(float(lengths[order[:-1], order[1:]].sum()), 1e-300)
    for _ in range(_PASSES):
        if not alive():
            break
        changed = False
        for i in range(count - 1):
            # Reversing places i+1 .. j replaces the steps (i, i+1) and (j, j+1) by (i, j) and (i+1, j+1).
            ends, after = order[i + 2 : -1], order[i + 3 :]
            gain = (
                lengths[order[i], order[i + 1]] + lengths[ends, after] - lengths[order[i], ends] - lengths[order[i + 1], after]
            )
            best = int(gain.argmax())
            if gain[best] > least:
                order[i + 1 : i + 3 + best] = order[i + 1 : i + 3 + best][::-1].copy()
                changed = True
        # Reversals alone cannot take the path apart at its longest step and join its two ends.
        path = order[1:-1]
        steps = lengths[path[:-1], path[1:]]
        widest = int(steps.argmax())
        if steps[widest] - lengths[path[-1], path[0]] > least:
            order[1:-1] = np.roll(path, -widest - 1)
            changed = True
        if not changed:
            break
    return order[1:-1]


def seriations(tensor: Tensor, axis: int, alive: Alive = lambda: True) -> dict[str, FibreOrder]:
    """Orders of one axis worth trying, by name; those equal to the native order or its reverse are left out. None where even
    the nearest fibres are hardly nearer than any: there is nothing to put side by side; fewer once not ``alive``."""
    distances = squared_distances(tensor, axis)
    nearest = np.partition(distances, 1, 1)[:, 1]
    if nearest.mean() > _NEAR * distances.mean() or not alive():
        return {}
    found = {"spectral": spectral_fibres(distances)}
    if alive():
        found["path"] = path_fibres(distances, found["spectral"], alive)
    if alive():
        found["smooth"] = smooth_fibres(distances, found["path"], alive)
    native = list(range(tensor.shape[axis]))
    return {
        name: FibreOrder(axis=axis, permutation=tuple(order))
        for name, order in found.items()
        if order not in (native, native[::-1])
    }


def assigned(matrix: Tensor, radices: Split, alive: Alive = lambda: True) -> tuple[list[int], list[int]]:
    """Row and column orders under which a matrix is closest to a sum of few Kronecker products.

    Alternates a fit (truncated SVD of the rearranged matrix) with a linear assignment of rows, then of columns, to those of
    the fit, once for every rank up to what stands out of the noise (Gavish & Donoho 1305.5870): fits of too high a rank repeat
    the wrong places they were fitted to. The order of least entropy of the rearranged spectrum wins. It repairs orders that are
    partly right; a full scramble needs a better start (see ``seriations``).
    """
    target = matrix.double().cpu().numpy()
    native = np.arange(len(target)), np.arange(target.shape[1])
    values = _values(_arranged(target, radices))
    most = standing_out(values, _arranged(target, radices).shape)
    best = (_entropy(values), native)
    for rank in sorted({1 << power for power in range(most.bit_length())} | {most}):
        if not alive():
            break
        rows, columns = _alternate(target, radices, rank, alive)
        entropy = _entropy(_values(_arranged(target[np.ix_(rows, columns)], radices)))
        if entropy < best[0] - 1e-9:
            best = entropy, (rows, columns)
    return best[1][0].tolist(), best[1][1].tolist()


def _alternate(target: np.ndarray, radices: Split, rank: int, alive: Alive) -> tuple[np.ndarray, np.ndarray]:
    rows, columns = np.arange(len(target)), np.arange(target.shape[1])
    total, first = float((target**2).sum()), 0.0
    for number in range(_ROUNDS):
        fit = _kronecker_fit(target[np.ix_(rows, columns)], radices, rank)
        share = float((fit**2).sum()) / max(total, 1e-300)
        first = first or share
        # Orders that are partly right are put right in leaps; on what has no such order every round gains next to nothing.
        if not alive() or (number >= _TRIAL_ROUNDS and share - first < _LEAP):
            break
        new_rows = _assign(target[:, columns], fit)
        fit = _kronecker_fit(target[np.ix_(new_rows, columns)], radices, rank)
        new_columns = _assign(target[new_rows].T, fit.T)
        if np.array_equal(new_rows, rows) and np.array_equal(new_columns, columns):
            break
        rows, columns = new_rows, new_columns
    return rows, columns


def _values(arranged: np.ndarray) -> np.ndarray:
    """Singular values, descending, from the smaller Gram matrix."""
    short = arranged if len(arranged) <= arranged.shape[1] else arranged.T
    return np.asarray(np.sqrt(np.maximum(np.linalg.eigvalsh(short @ short.T)[::-1], 0.0)))


def _entropy(values: np.ndarray) -> float:
    weights = values**2 / max(float((values**2).sum()), 1e-300)
    return float(-(weights * np.log2(np.maximum(weights, 1e-300))).sum())


def _arranged(matrix: np.ndarray, radices: Split) -> np.ndarray:
    """Rows: high digits of both axes; columns: low digits (Van Loan's rearrangement)."""
    (a, b), (c, d) = radices
    return np.asarray(matrix.reshape(a, b, c, d).transpose(0, 2, 1, 3).reshape(a * c, b * d))


def _assign(items: np.ndarray, places: np.ndarray) -> np.ndarray:
    """``order`` so that ``items[order]`` is nearest to ``places``."""
    cost = (places**2).sum(1)[:, None] - 2 * places @ items.T + (items**2).sum(1)
    return np.asarray(linear_sum_assignment(cost)[1])


def _kronecker_fit(matrix: np.ndarray, radices: Split, rank: int) -> np.ndarray:
    (a, b), (c, d) = radices
    arranged = _arranged(matrix, radices)
    if len(arranged) <= arranged.shape[1]:
        basis = np.linalg.eigh(arranged @ arranged.T)[1][:, -rank:]
        fit = basis @ (basis.T @ arranged)
    else:
        basis = np.linalg.eigh(arranged.T @ arranged)[1][:, -rank:]
        fit = (arranged @ basis) @ basis.T
    return np.asarray(fit.reshape(a, c, b, d).transpose(0, 2, 1, 3).reshape(matrix.shape))


def standing_out(values: np.ndarray, shape: tuple[int, int], rounding: float = _ROUNDING) -> int:
    """How many singular values of a matrix of ``shape`` stand out of noise of unknown level (at least 1); below a share
    ``rounding`` of the largest there is nothing but that of a Gram matrix."""
    ratio = min(shape) / max(shape)
    threshold = (0.56 * ratio**3 - 0.95 * ratio**2 + 1.82 * ratio + 1.43) * float(np.median(values))
    return max(1, int((values > max(threshold, rounding * float(values[0]))).sum()))


def kronecker_splits(shape: tuple[int, int]) -> list[Split]:
    """All ways to cut rows and columns in a high and a low digit, both at least 2."""

    def cuts(size: int) -> list[tuple[int, int]]:
        return [(size // low, low) for low in range(2, size // 2 + 1) if size % low == 0]

    return [(rows, columns) for rows in cuts(shape[0]) for columns in cuts(shape[1])]


def best_split(matrix: Tensor, alive: Alive = lambda: True) -> Split | None:
    """The cut whose rearranged matrix stands out most: its share of the energy less its share of the numbers, at least 2 %.

    Of large matrices spectra are estimated from a sample of the longer side. Where there are many cuts, only those whose
    sampled blocks stand out most are looked at as a whole. Once not ``alive`` it is the best of those seen."""
    best: tuple[float, Split] | None = None
    wide = matrix.double() if matrix.numel() <= _MANY else matrix.float()
    rounding = _ROUNDING if matrix.numel() <= _MANY else _ROUNDING_SINGLE
    for (a, b), (c, d) in _likely_splits(wide):
        if not alive():
            break
        side = min(a * c, b * d)
        arranged = wide.reshape(a, b, c, d).permute(0, 2, 1, 3).reshape(a * c, b * d)
        arranged = arranged if a * c <= b * d else arranged.T
        if matrix.numel() > _MANY and arranged.shape[1] > _SAMPLED * side:
            drawn = torch.randperm(arranged.shape[1], generator=torch.Generator().manual_seed(0))[: _SAMPLED * side]
            arranged = arranged[:, drawn.to(arranged.device)]
        values = torch.linalg.eigvalsh(arranged @ arranged.T).double().cpu().flip(0).clamp_min(0).sqrt().numpy()
        score = _score(values, (arranged.shape[0], arranged.shape[1]), (a * c, b * d), rounding)
        if best is None or score > best[0]:
            best = score, ((a, b), (c, d))
    return None if best is None or best[0] <= _STANDS_OUT else best[1]


def _score(values: np.ndarray, shape: tuple[int, int], whole: tuple[int, int], rounding: float) -> float:
    """Share of the energy of a matrix of ``shape`` that stands out, less that of the numbers which the ``whole`` takes."""
    rank = standing_out(values, shape, rounding)
    explained = float((values[:rank] ** 2).sum()) / max(float((values**2).sum()), 1e-300)
    return explained - rank * sum(whole) / (whole[0] * whole[1])


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


def diagonal_order(matrix: Tensor) -> list[int]:
    """The order of columns that brings the largest magnitudes of a square matrix to its diagonal."""
    order: list[int] = np.asarray(linear_sum_assignment(-matrix.abs().double().cpu().numpy())[1]).tolist()
    return order
