"""Orders of the fibres of an axis by their distances: along a spectrum, along a short path, and along one without kinks.

Where fibres run past each other (a wave and its reflection), a shortest path leaps between them, and only the direction of the
steps tells the two apart: the order without kinks is made for these.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from scipy.optimize import linear_sum_assignment
from scipy.sparse import csc_array
from scipy.sparse.csgraph import connected_components, laplacian
from scipy.sparse.linalg import eigsh
from torch import Tensor

from tensornet_compress.searching.limits import NEVER, Deadline
from tensornet_compress.tensor import FibreOrder

LARGEST_ASSIGNED = 1024
_SHORTEST, _LARGEST_FIBRES = 4, 4096
_NEAR = 0.6
_NEIGHBOURS = 8
_DENSE_GRAPH = 1500
_SHIFT = 1e-3
_PATH_PASSES = 60
_GROWN = 8
_SMOOTH_PASSES = 20
_LARGEST_MENDED = 1024


def fibre_starts(tensor: Tensor, deadline: Deadline = NEVER) -> list[tuple[FibreOrder, ...]]:
    """Orders that a search starts from: columns with the largest entries of a square matrix on its diagonal (hidden
    permutations), seriation of all axes that are long enough, and of each alone."""
    by_axis: dict[int, dict[str, FibreOrder]] = {}
    for axis, size in enumerate(tensor.shape):
        if _SHORTEST <= size <= _LARGEST_FIBRES and tensor.ndim > 1 and not deadline.passed():
            by_axis[axis] = seriations(tensor, axis, deadline)
    starts: list[tuple[FibreOrder, ...]] = []
    if tensor.ndim == 2 and tensor.shape[0] == tensor.shape[1] <= LARGEST_ASSIGNED:
        diagonal = changed_orders([range(len(tensor)), diagonal_order(tensor)])
        starts += [diagonal] if diagonal else []
    for name in ("path", "smooth", "spectral"):
        orders = tuple(named[name] for named in by_axis.values() if name in named)
        if orders and orders not in starts:
            starts.append(orders)
        starts += [(order,) for order in orders if len(orders) > 1 and name == "path"]
    return starts


def changed_orders(orders: Sequence[Sequence[int]]) -> tuple[FibreOrder, ...]:
    """The orders, one for each axis, that are not the native ones."""
    return tuple(
        FibreOrder(axis=axis, permutation=tuple(order))
        for axis, order in enumerate(orders)
        if list(order) != list(range(len(order)))
    )


def diagonal_order(matrix: Tensor) -> list[int]:
    """The order of columns that brings the largest magnitudes of a square matrix to its diagonal."""
    order: list[int] = np.asarray(linear_sum_assignment(-matrix.abs().double().cpu().numpy())[1]).tolist()
    return order


def seriations(tensor: Tensor, axis: int, deadline: Deadline = NEVER) -> dict[str, FibreOrder]:
    """Orders of one axis worth trying, by name; those equal to the native order or its reverse are left out. None where even
    the nearest fibres are hardly nearer than any: there is nothing to put side by side; fewer once the deadline has passed."""
    distances = squared_distances(tensor, axis)
    nearest = np.partition(distances, 1, 1)[:, 1]
    if nearest.mean() > _NEAR * distances.mean() or deadline.passed():
        return {}
    orders = {"spectral": spectral_fibres(distances)}
    if not deadline.passed():
        orders["path"] = path_fibres(distances, orders["spectral"], deadline)
    if not deadline.passed():
        orders["smooth"] = smooth_fibres(distances, orders["path"], deadline)
    native = list(range(tensor.shape[axis]))
    return {
        name: FibreOrder(axis=axis, permutation=tuple(order))
        for name, order in orders.items()
        if order not in (native, native[::-1])
    }


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


def path_fibres(distances: np.ndarray, start: Sequence[int], deadline: Deadline = NEVER) -> list[int]:
    """A short path through all fibres: the shorter of ``start`` and the greedy path, improved by reversals (2-opt) and by
    joining its two ends, until nothing changes."""
    lengths, count = np.sqrt(distances), len(distances)
    paths = [np.asarray(start), _greedy_path(lengths)]
    path = min(paths, key=lambda path: float(lengths[path[:-1], path[1:]].sum()))
    # A fibre at no distance from all others stands for the start and for the end.
    lengths = np.pad(lengths, (0, 1))
    order = np.concatenate([[count], path, [count]])
    least = 1e-9 * max(float(lengths[order[:-1], order[1:]].sum()), 1e-300)

    def gains(i: int) -> np.ndarray:
        # Reversing places i+1 .. j replaces the steps (i, i+1) and (j, j+1) by (i, j) and (i+1, j+1).
        a, b, ends, after = order[i], order[i + 1], order[i + 2 : -1], order[i + 3 :]
        return np.asarray(lengths[a, b] + lengths[ends, after] - lengths[a, ends] - lengths[b, after])

    for _ in range(_PATH_PASSES):
        if deadline.passed():
            break
        changed = _reversals(order, gains, range(count - 1), least)
        # Reversals alone cannot take the path apart at its longest step and join its two ends.
        path = order[1:-1]
        steps = lengths[path[:-1], path[1:]]
        widest = int(steps.argmax())
        if steps[widest] - lengths[path[-1], path[0]] > least:
            order[1:-1] = np.roll(path, -widest - 1)
            changed = True
        if not changed:
            break
    return order[1:-1].tolist()


def _greedy_path(lengths: np.ndarray) -> np.ndarray:
    """From one end of the longest distance always to the nearest fibre left."""
    count = len(lengths)
    left = np.ones(count, bool)
    path = [int(np.unravel_index(int(lengths.argmax()), lengths.shape)[0])]
    for _ in range(count - 1):
        left[path[-1]] = False
        path.append(int(np.where(left, lengths[path[-1]], np.inf).argmin()))
    return np.asarray(path)


def _reversals(order: np.ndarray, gains: Callable[[int], np.ndarray], places: range, least: float) -> bool:
    """One pass over an order: at each place ``i`` in turn the part that starts after it is reversed, up to the end that gains
    most (``gains(i)``: by ends, from i + 2 on), where that is more than ``least``. Whether anything changed."""
    changed = False
    for i in places:
        gain = gains(i)
        best = int(gain.argmax())
        if gain[best] > least:
            order[i + 1 : i + 3 + best] = order[i + 1 : i + 3 + best][::-1].copy()
            changed = True
    return changed


def smooth_fibres(distances: np.ndarray, path: Sequence[int], deadline: Deadline = NEVER) -> list[int]:
    """Of ``path`` and of orders that grow from some of its steps, the one with the least ``kinks``.

    An order grows at both ends, each time by the fibre that lies nearest to where the last step leads; then reversals of
    parts take out kinks that are left (of up to 1,024 fibres).
    """
    count = len(distances)
    if count < 4:
        return list(path)
    starts = np.unique(np.linspace(0, count - 2, _GROWN).astype(int))
    grown = [_grown(distances, path[start], path[start + 1]) for start in starts if not deadline.passed()]
    if not grown:
        return list(path)
    best = min(grown, key=lambda order: kinks(distances, order))
    if count <= _LARGEST_MENDED:
        best = _mended(distances, best, deadline)
    return best.tolist() if kinks(distances, best) < kinks(distances, path) else list(path)


def kinks(distances: np.ndarray, order: Sequence[int] | np.ndarray) -> float:
    """The sum of the squared second differences ``|x - 2 y + z|^2`` along an order, from squared distances (n, n)."""
    path = np.asarray(order)
    return float(_kink(distances, path[:-2], path[1:-1], path[2:]).sum())


def _kink(distances: np.ndarray, a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    return np.asarray(2 * distances[a, b] + 2 * distances[b, c] - distances[a, c])


def _grown(distances: np.ndarray, first: int, second: int) -> np.ndarray:
    left = np.ones(len(distances), bool)
    left[[first, second]] = False
    ends = [[first], [second]]
    inner = [second, first]

    def following(end: int) -> tuple[float, int]:
        a, b = inner[end], ends[end][-1]
        # |x - (2 b - a)|^2 from squared distances alone.
        away = np.where(left, 2 * distances[b] - distances[a] + 2 * distances[a, b], np.inf)
        return float(away.min()), int(away.argmin())

    nearest = [following(0), following(1)]
    for _ in range(len(distances) - 2):
        end = int(nearest[1][0] < nearest[0][0])
        chosen = nearest[end][1]
        left[chosen] = False
        inner[end] = ends[end][-1]
        ends[end].append(chosen)
        nearest[end] = following(end)
        if nearest[1 - end][1] == chosen:
            nearest[1 - end] = following(1 - end)
    return np.asarray(ends[0][::-1] + ends[1])


def _mended(distances: np.ndarray, order: np.ndarray, deadline: Deadline) -> np.ndarray:
    """An order with parts reversed until nothing takes out kinks any more."""
    count = len(order)
    # Two fibres at no distance from any other stand before the first and two after the last.
    padded = np.pad(distances, (0, 4))
    order = np.concatenate([[count, count + 1], order, [count + 2, count + 3]])
    least = 1e-9 * max(kinks(padded, order[2:-2]), 1e-300)

    def kink(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
        return np.where((a < count) & (b < count) & (c < count), _kink(padded, a, b, c), 0.0)

    def gains(i: int) -> np.ndarray:
        last = np.arange(i + 2, count + 2)
        a, b, c, d = (np.full(len(last), order[i + step]) for step in (-1, 0, 1, 2))
        w, x, y, z = (order[last + step] for step in (-1, 0, 1, 2))
        before = kink(a, b, c) + kink(b, c, d) + kink(w, x, y) + kink(x, y, z)
        after = kink(a, b, x) + kink(b, x, w) + kink(d, c, y) + kink(c, y, z)
        return before - after

    for _ in range(_SMOOTH_PASSES):
        if deadline.passed() or not _reversals(order, gains, range(1, count), least):
            break
    return order[2:-2]
