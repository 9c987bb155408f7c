"""Metrics: the inner product in which the error of a weight matrix is measured.

A weight ``W`` is (m, n), rows are outputs. An error ``E`` costs ``norm2(E)``:

====================  =============================  =========================
metric                rows                           columns
====================  =============================  =========================
Euclidean             identity                       identity
input second moment   identity                       ``C_x = E[x x']``
diagonal input        identity                       diagonal
row Fisher            diagonal                       identity
Fisher                diagonal                       ``C_x``
Kronecker (KFAC)      ``C_g = E[g g']``              ``C_x``
====================  =============================  =========================

All of these are one class, ``KroneckerMetric``: ``norm2(E) = tr(R E C E')``. ALS refinement needs no such structure, only
``norm2`` and ``apply`` (``Metric``): ``ElementwiseMetric`` is of that kind.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Protocol

import torch
from safetensors.torch import load, save_file
from torch import Tensor

from tensornet_compress.errors import TensorNetError

_BLOCK = 1 << 16
_ROWS = 1 << 13


class Metric(Protocol):
    """What ALS refinement needs of a metric on (m, n) matrices."""

    def norm2(self, error: Tensor) -> float:
        """Squared norm of an (m, n) error."""
        ...

    def apply(self, error: Tensor) -> Tensor:
        """Half the gradient of ``norm2`` at an (m, n) error."""
        ...


def squared_norm(tensor: Tensor) -> float:
    """The sum of the squares of all entries in double precision, a block at a time: no wide copy of the whole tensor."""
    if tensor.device.type != "cpu" or tensor.numel() <= _BLOCK:
        return float(torch.linalg.vector_norm(tensor, dtype=torch.float64)) ** 2
    blocks = (block.double() for block in tensor.detach().reshape(-1).split(_BLOCK))
    return sum(float(torch.dot(block, block)) for block in blocks)


class KroneckerMetric:
    """``norm2(E) = tr(R E C E')`` with ``rows`` R and ``columns`` C each None (identity), a diagonal (k,) or SPD (k, k).

    ``rate``: divergence in nats per token and unit of ``norm2``; None when the metric knows nothing of the loss.
    """

    def __init__(self, rows: Tensor | None = None, columns: Tensor | None = None, rate: float | None = None):
        self.rows, self.columns, self.rate = _checked(rows, "row"), _checked(columns, "column"), rate

    def to(self, device: torch.device | str) -> KroneckerMetric:
        """The same metric with its factors on a device."""
        rows, columns = (None if factor is None else factor.to(device) for factor in (self.rows, self.columns))
        return self if rows is self.rows and columns is self.columns else KroneckerMetric(rows, columns, self.rate)

    def apply(self, error: Tensor) -> Tensor:
        """``R E C``, shape (m, n)."""
        return _left(self.rows, self.apply_columns(error))

    def norm2(self, error: Tensor) -> float:
        """Squared norm of an (m, n) error."""
        if self.rows is None and self.columns is None:
            return squared_norm(error)
        if len(error) > _ROWS and (self.rows is None or self.rows.ndim == 1):
            # Some rows at a time: the table of a large vocabulary would need six times its memory.
            weights = [None] * len(error) if self.rows is None else self.rows.split(_ROWS)
            return sum(KroneckerMetric(w, self.columns).norm2(part) for w, part in zip(weights, error.split(_ROWS)))
        return float(self.apply(error).double().mul_(error).sum())

    def apply_columns(self, rows: Tensor) -> Tensor:
        """``V C`` for rows V (k, n)."""
        if self.columns is None or self.columns.ndim == 1:
            return _left(self.columns, rows.T).T
        return rows @ self.columns.to(rows.dtype)

    def left_whiten(self, matrix: Tensor) -> Tensor:
        """``L' W`` with ``R = L L'``."""
        powers = self._row_powers
        return matrix if powers is None else powers.scaled(powers.inwards(matrix), 0.5)

    def left_whiten_adjoint(self, matrix: Tensor) -> Tensor:
        """``L Z``: the transpose of ``left_whiten``."""
        powers = self._row_powers
        return matrix if powers is None else powers.outwards(powers.scaled(matrix, 0.5))

    def left_unwhiten(self, matrix: Tensor) -> Tensor:
        """``L'^-1 Z``: the inverse of ``left_whiten``."""
        powers = self._row_powers
        return matrix if powers is None else powers.outwards(powers.scaled(matrix, -0.5))

    def precondition(self, gradient: Tensor) -> Tensor:
        """``R^-1 G C^-1`` for a gradient G (m, n): the direction of steepest descent in the metric."""
        if self._column_powers is not None:
            gradient = self._column_powers.inverse(gradient.T).T
        return gradient if self._row_powers is None else self._row_powers.inverse(gradient)

    def gram(self, matrix: Tensor) -> Tensor:
        """``L' W C W' L``, float64 (m, m): its eigenvalues are the squared singular values of the whitened matrix."""
        whitened = self.left_whiten(matrix.double())
        return whitened @ self.apply_columns(whitened).T

    def importance(self) -> Tensor | None:
        """Diagonal of the column factor (n,), the weight of each input in an error; None when Euclidean."""
        if self.columns is None:
            return None
        return self.columns if self.columns.ndim == 1 else self.columns.diagonal()

    @property
    def mean_price(self) -> float:
        """What a unit of squared error that points nowhere in particular costs."""
        rows = self.rows if self.rows is None or self.rows.ndim == 1 else self.rows.diagonal()
        weights = [weight for weight in (rows, self.importance()) if weight is not None]
        return prod(float(weight.double().mean()) for weight in weights)

    @cached_property
    def _row_powers(self) -> _Powers | None:
        return None if self.rows is None else _Powers.of(self.rows)

    @cached_property
    def _column_powers(self) -> _Powers | None:
        return None if self.columns is None else _Powers.of(self.columns)


def euclidean() -> KroneckerMetric:
    """The Frobenius metric."""
    return KroneckerMetric()


def input_second_moment(moment: Tensor, ridge: float = 1e-4) -> KroneckerMetric:
    """The activation-aware metric ``C_x = E[x x']`` (SVD-LLM, 2403.07378), with ``ridge * mean(diag)`` added to the diagonal
    so that directions that calibration never saw keep a small price."""
    level = float(moment.diagonal().mean())
    if not level > 0:
        raise TensorNetError(f"an input second moment of shape {tuple(moment.shape)} has trace {level}; the layer saw no input")
    return KroneckerMetric(columns=moment + ridge * level * torch.eye(len(moment), dtype=moment.dtype, device=moment.device))


class ElementwiseMetric:
    """The full diagonal Fisher metric: ``norm2(E) = sum_ij F_ij E_ij^2`` with ``weights`` F (m, n), non-negative.

    No closed-form truncation exists; ALS solves it. ``rate``: as in ``KroneckerMetric``.
    """

    def __init__(self, weights: Tensor, rate: float | None = None):
        if weights.ndim != 2 or not torch.isfinite(weights).all() or bool((weights < 0).any()):
            raise TensorNetError(
                f"an elementwise metric needs finite non-negative weights (m, n), was given shape {tuple(weights.shape)}"
            )
        self.weights, self.rate = weights, rate

    def apply(self, error: Tensor) -> Tensor:
        """``F * E``, shape (m, n)."""
        return self.weights.to(error.dtype) * error

    def norm2(self, error: Tensor) -> float:
        """Squared norm of an (m, n) error."""
        return float((self.weights.double() * error.double().square()).sum())

    def separable(self) -> KroneckerMetric:
        """The nearest product of row and column weights with the same marginals: where iteration starts."""
        rows, columns = self.weights.double().mean(1), self.weights.double().mean(0)
        level = float(rows.mean())
        if level <= 0:
            raise TensorNetError("an elementwise metric whose weights are all zero measures nothing")
        return KroneckerMetric(rows.clamp_min(1e-9 * level), (columns / level).clamp_min(1e-9), rate=self.rate)


@dataclass(frozen=True)
class StoredMetric:
    """A Kronecker metric in safetensors files, so that memory need not hold those of all layers. Layers that share their column
    factor share its file."""

    file: Path
    rate: float | None
    columns: Path | None = None

    @classmethod
    def write_all(
        cls, metrics: Iterable[tuple[str, KroneckerMetric | StoredMetric]], folder: Path, stem: str = "metric"
    ) -> dict[str, StoredMetric]:
        """Write metrics by name to ``folder`` as they come, to files of a ``stem``; those that lie in files already stay there.
        Of one column factor that follows itself there is one file."""
        found: dict[str, StoredMetric] = {}
        last: tuple[Tensor | None, Path | None] = (None, None)
        for number, (name, metric) in enumerate(metrics):
            if isinstance(metric, StoredMetric):
                found[name] = metric
                continue
            if metric.columns is not None and metric.columns is not last[0]:
                last = metric.columns, folder / f"{stem}-columns-{number}.safetensors"
                save_file({"columns": metric.columns.cpu().contiguous()}, str(last[1]))
            file = folder / f"{stem}-rows-{number}.safetensors"
            save_file({} if metric.rows is None else {"rows": metric.rows.cpu().contiguous()}, file)
            found[name] = cls(file, metric.rate, None if metric.columns is None else last[1])
        return found

    @property
    def files(self) -> list[Path]:
        """Where it lies."""
        return [self.file] if self.columns is None else [self.file, self.columns]

    def to_json(self) -> tuple[float | None, list[str]]:
        """Its rate and the names of its files."""
        return self.rate, [file.name for file in self.files]

    @classmethod
    def from_json(cls, folder: Path, rate: float | None, names: Sequence[str]) -> StoredMetric:
        """What ``to_json`` told, in the folder of its files."""
        file, columns = (folder / names[0], folder / names[1] if len(names) > 1 else None)
        return cls(file, rate, columns)

    def load(self, columns: Tensor | None = None) -> KroneckerMetric:
        """The metric, number for number; ``columns``: its column factor, where that was loaded for another layer."""
        factors = load(self.file.read_bytes())
        if columns is None and self.columns is not None:
            columns = load(self.columns.read_bytes())["columns"]
        return KroneckerMetric(factors.get("rows"), columns, self.rate)


def loaded(metric: KroneckerMetric | StoredMetric | None, columns: Tensor | None = None) -> KroneckerMetric | None:
    """A metric in memory, wherever it was kept; ``columns`` as for ``StoredMetric.load``."""
    return metric.load(columns) if isinstance(metric, StoredMetric) else metric


def loaded_in_turn(metrics: Iterable[KroneckerMetric | StoredMetric | None]) -> Iterator[KroneckerMetric]:
    """Metrics in memory, Euclidean ones for None. Those that follow each other and share the file of their column factor share
    the tensor."""
    file, columns = None, None
    for metric in metrics:
        if not isinstance(metric, StoredMetric) or metric.columns is None or metric.columns != file:
            # Let go of before another is read.
            file, columns = None, None
        found = loaded(metric, columns) or euclidean()
        if isinstance(metric, StoredMetric):
            file, columns = metric.columns, found.columns
        yield found
        del found


def _checked(factor: Tensor | None, side: str) -> Tensor | None:
    if factor is None:
        return None
    if factor.ndim not in (1, 2) or (factor.ndim == 2 and factor.shape[0] != factor.shape[1]):
        raise TensorNetError(f"the {side} factor of a metric must be (k,) or (k, k), was given {tuple(factor.shape)}")
    # The extremes are NaN where any entry is, and need no mask as large as they.
    if factor.numel() and not all(bool(extreme.isfinite()) for extreme in factor.aminmax()):
        raise TensorNetError(f"the {side} factor of a metric holds NaN or infinite entries; check the calibration batches")
    return factor


def _left(factor: Tensor | None, matrix: Tensor) -> Tensor:
    if factor is None:
        return matrix
    factor = factor.to(matrix.dtype)
    return factor[:, None] * matrix if factor.ndim == 1 else factor @ matrix


@dataclass(frozen=True)
class _Powers:
    """Powers of a diagonal or SPD factor ``V diag(values) V'`` in float64: one eigendecomposition, one stored matrix."""

    values: Tensor
    vectors: Tensor | None

    @classmethod
    def of(cls, factor: Tensor) -> _Powers:
        wide = factor.double()
        values, vectors = (wide, None) if wide.ndim == 1 else torch.linalg.eigh(wide)
        return cls(values.clamp_min(float(values.max()) * 1e-12), vectors)

    def inwards(self, matrix: Tensor) -> Tensor:
        """``V' M``."""
        return matrix if self.vectors is None else self.vectors.to(matrix.dtype).T @ matrix

    def outwards(self, matrix: Tensor) -> Tensor:
        """``V M``."""
        return matrix if self.vectors is None else self.vectors.to(matrix.dtype) @ matrix

    def scaled(self, matrix: Tensor, exponent: float) -> Tensor:
        """``diag(values)^exponent M``."""
        return (self.values**exponent).to(matrix.dtype)[:, None] * matrix

    def inverse(self, matrix: Tensor) -> Tensor:
        """``factor^-1 M``."""
        return self.outwards(self.scaled(self.inwards(matrix), -1.0))
