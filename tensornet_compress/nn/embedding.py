"""TNEmbedding: rows of a network looked up by index, without forming the whole table."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tensornet_compress.coding import FloatFormat
from tensornet_compress.errors import TensorNetError
from tensornet_compress.nn.kinds import embedding_scale
from tensornet_compress.nn.module import BATCH_BUCKETS, NetworkModule
from tensornet_compress.tensor import (
    FibreOrder,
    NetworkSpec,
    Program,
    Tensorization,
    TensorNetwork,
    TermSpec,
    plan_contraction,
)


class TNEmbedding(NetworkModule):
    """An embedding table (count, width) kept as a network; indices (...) -> vectors (..., width), times a number."""

    axes = ("count", "width")

    def __init__(
        self, spec: NetworkSpec, stored: dict[str, Tensor] | None = None, padding_idx: int | None = None, scale: float = 1.0
    ):
        """``scale``: what looked-up vectors are multiplied with."""
        super().__init__(spec, stored)
        self.scale = scale
        self.num_embeddings, self.embedding_dim = spec.shape
        self.padding_idx, self.max_norm, self.norm_type = padding_idx, None, 2.0
        self.scale_grad_by_freq = self.sparse = False
        self._lookups = [_Lookup.of(term) for term in spec.terms]
        self._programs = [[(bucket, self._plan(term, bucket)) for bucket in BATCH_BUCKETS] for term in spec.terms]

    @classmethod
    def from_embedding(cls, embedding: nn.Embedding, network: TensorNetwork) -> TNEmbedding:
        """Replace an ``nn.Embedding`` by a network of its table.

        Raises:
            TensorNetError: shapes differ, or the embedding renormalises its rows (``max_norm``), which a network cannot.
        """
        if embedding.max_norm is not None:
            raise TensorNetError(f"an embedding with max_norm={embedding.max_norm} rewrites its table; it cannot be compressed")
        scale = embedding_scale(embedding)
        assert scale is not None
        return cls._in_place_of(embedding, network, padding_idx=embedding.padding_idx, scale=scale)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - as torch calls it
        """Integer indices (...) -> (..., width) in the replaced module's dtype.

        Raises:
            IndexError: an index outside the table, as ``nn.Embedding`` does; checked on the CPU only.
        """
        flat = input.reshape(-1)
        self._check_range(flat)
        rows = [self._rows(number, lookup, flat) for number, lookup in enumerate(self._lookups)]
        total = rows[0] if len(rows) == 1 else torch.stack(rows).sum(0)
        total = total.reshape(*input.shape, self.embedding_dim)
        return total if self.scale == 1 else total * self.scale

    def _rows(self, number: int, lookup: _Lookup, flat: Tensor) -> Tensor:
        if lookup.row_order is not None:
            flat = lookup.row_order.inverse().index(flat.device)[flat]
        digits = dict(zip(lookup.positions, lookup.tensorization.digits(0, flat)))
        operands = [self._picked(number, core, legs, digits) for core, legs in enumerate(lookup.legs)]
        rows = self._program(number, len(flat)).run(operands)
        rows = rows.reshape(len(flat), lookup.width)[:, : self.embedding_dim]
        return rows if lookup.column_order is None else rows[:, lookup.column_order.inverse().index(rows.device)]

    def _check_range(self, flat: Tensor) -> None:
        if flat.device.type != "cpu" or torch.compiler.is_compiling() or not flat.numel():
            return
        low, high = int(flat.min()), int(flat.max())
        if low < 0 or high >= self.num_embeddings:
            raise IndexError(f"indices from {low} to {high} for a table of {self.num_embeddings} rows")

    def _plan(self, term: TermSpec, count: int) -> Program:
        labels = []
        for core, legs in enumerate(_Lookup.of(term).legs):
            kept = tuple(name for axis, name in enumerate(term.topology.core_labels(core)) if axis not in legs)
            labels.append(("n", *kept) if legs else kept)
        columns = tuple(f"p{p}" for p in term.layout.axis_positions(1))
        return plan_contraction(labels, ("n", *columns), term.sizes() | {"n": count})

    def _picked(self, number: int, core: int, legs: dict[int, int], digits: dict[int, Tensor]) -> Tensor:
        """A core with its row legs replaced by one leading axis, the looked-up indices."""
        shape, fmt = self._shapes[number][core], self.spec.terms[number].formats[core]
        parts = self.core_parts(number, core)
        if list(legs) == [0] and self._held is None and not isinstance(fmt, FloatFormat):
            return fmt.decode_rows(parts, shape, digits[legs[0]], self.compute_dtype)
        decoded = self.cores(self.compute_dtype)[number][core] if self._held is not None else None
        if decoded is None:
            decoded = fmt.decode(parts, shape, self.compute_dtype)
        if not legs:
            return decoded
        others = [axis for axis in range(len(shape)) if axis not in legs]
        return decoded.permute(*legs, *others)[tuple(digits[position] for position in legs.values())]

    def materialize(self) -> nn.Module:
        """The dense embedding of the original class, in the original dtype."""
        return self._made_dense(nn.Embedding(self.num_embeddings, self.embedding_dim, self.padding_idx, device="meta"))


@dataclass(frozen=True)
class _Lookup:
    """What looking up a row of a term needs of its layout, worked out once: a call follows no layout."""

    tensorization: Tensorization
    positions: tuple[int, ...]
    """Positions of the digits of the row index, most significant first."""
    legs: tuple[dict[int, int], ...]
    """Of each core, the axes that are digits of the row index, and their positions."""
    width: int
    row_order: FibreOrder | None
    column_order: FibreOrder | None

    @classmethod
    def of(cls, term: TermSpec) -> _Lookup:
        layout, positions = term.layout, term.layout.axis_positions(0)
        names = {f"p{position}": position for position in positions}
        legs = []
        for core in range(len(term.formats)):
            labels = term.topology.core_labels(core)
            legs.append({axis: names[label] for axis, label in enumerate(labels) if label in names})
        orders = layout.fibre_order(0), layout.fibre_order(1)
        return cls(layout.tensorization, positions, tuple(legs), layout.tensorization.padded_shape[1], *orders)
