"""One layer in a survey: what it is made of, and one way to store it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from tensornet_compress.coding import IntFormat, NumberFormat
from tensornet_compress.decompose import ErrorFeedback, MatrixSpectrum, column_feedback, matrix_spectrum, realise
from tensornet_compress.metric import KroneckerMetric
from tensornet_compress.options.offered import Family
from tensornet_compress.tensor import Layout, NetworkSpec, TensorNetwork, TermSpec, Topology


@dataclass(frozen=True)
class Option:
    """One way to store a layer: the spec, its exact bytes and its squared error in the metric (predicted until realised)."""

    family: Family
    spec: NetworkSpec
    nbytes: int
    error: float

    @property
    def is_float(self) -> bool:
        """Whether all cores are floating point."""
        return all(not isinstance(fmt, IntFormat) for term in self.spec.terms for fmt in term.formats)


class LayerStatistics:
    """A weight and a metric, with everything that predictions and realisation share computed at most once."""

    def __init__(self, weight: Tensor, metric: KroneckerMetric):
        self.weight = weight
        self.matrix = weight.float().reshape(weight.shape[0], -1)
        self.metric = metric
        self._rounded: dict[NumberFormat, TensorNetwork] = {}

    @cached_property
    def spectrum(self) -> MatrixSpectrum:
        """Two-core factorisation in the metric."""
        return matrix_spectrum(self.matrix, self.metric)

    @cached_property
    def feedback(self) -> ErrorFeedback | None:
        """Error feedback along the inputs, without the improvement of codes, which only what is kept is worth."""
        return column_feedback(self.metric, rounds=0)

    def rounded(self, fmt: NumberFormat) -> TensorNetwork:
        """The weight as one core in a number format."""
        if fmt not in self._rounded:
            shape = tuple(self.weight.shape)
            spec = self.spec(Layout.native(shape), Topology.one_core(len(shape)), (), (fmt,))
            self._rounded[fmt] = realise(self.weight, spec, self.metric, feedback=self.feedback)
        return self._rounded[fmt]

    @cached_property
    def energy(self) -> float:
        """Squared norm of the weight in the metric."""
        return self.metric.norm2(self.matrix)

    @cached_property
    def row_prices(self) -> Tensor:
        """What squared errors of each row count beside the column metric, float64 (m,)."""
        rows = self.metric.rows
        if rows is None:
            return torch.ones(len(self.matrix), dtype=torch.float64)
        return (rows if rows.ndim == 1 else rows.diagonal()).double()

    def spec(self, layout: Layout, topology: Topology, ranks: Sequence[int], formats: Sequence[NumberFormat]) -> NetworkSpec:
        """A one-term spec for this weight."""
        term = TermSpec(layout=layout, topology=topology, ranks=tuple(ranks), formats=tuple(formats))
        return NetworkSpec.of(term, self.weight.dtype)
