"""TNEmbedding: rows of a network looked up by index, without forming the whole table."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tensornet_compress.coding import FloatFormat
from tensornet_compress.errors import TensorNetError
from tensornet_compress.nn.module import BATCH_BUCKETS, NetworkModule, embedding_scale
from tensornet_compress.tensor import NetworkSpec, Program, TensorNetwork, TermSpec, plan_contraction


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

    def forward(self, indices: Tensor) -> Tensor:
        """Integer indices (...) -> (..., width) in the replaced module's dtype.

        Raises:
            IndexError: an index outside the table, as ``nn.Embedding`` does; checked on the CPU only.
        """
        flat = indices.reshape(-1)
        self._check_range(flat)
        rows = [self._rows(number, term, flat) for number, term in enumerate(self.spec.terms)]
        total = rows[0] if len(rows) == 1 else torch.stack(rows).sum(0)
        total = total.reshape(*indices.shape, self.embedding_dim)
        return total if self.scale == 1 else total * self.scale

    def _rows(self, number: int, term: TermSpec, flat: Tensor) -> Tensor:
        layout = term.layout
        order = layout.fibre_order(0)
        if order is not None:
            flat = order.inverse().index(flat.device)[flat]
        digits = dict(zip(layout.axis_positions(0), layout.tensorization.digits(0, flat)))
        operands = [self._picked(number, term, core, digits) for core in range(len(term.formats))]
        rows = self._program(number, len(flat)).run(operands)
        rows = rows.reshape(len(flat), layout.tensorization.padded_shape[1])[:, : self.embedding_dim]
        column_order = layout.fibre_order(1)
        return rows if column_order is None else rows[:, column_order.inverse().index(rows.device)]

    def _check_range(self, flat: Tensor) -> None:
        if flat.device.type != "cpu" or torch.compiler.is_compiling() or not flat.numel():
            return
        low, high = int(flat.min()), int(flat.max())
        if low < 0 or high >= self.num_embeddings:
            raise IndexError(f"indices from {low} to {high} for a table of {self.num_embeddings} rows")

    def _plan(self, term: TermSpec, count: int) -> Program:
        labels = []
        for core in range(len(term.formats)):
            names = term.topology.core_labels(core)
            row_axes = _row_axes(term, names)
            kept = tuple(name for axis, name in enumerate(names) if axis not in row_axes)
            labels.append(("n", *kept) if row_axes else kept)
        columns = tuple(f"p{p}" for p in term.layout.axis_positions(1))
        return plan_contraction(labels, ("n", *columns), term.sizes() | {"n": count})

    def _picked(self, number: int, term: TermSpec, core: int, digits: dict[int, Tensor]) -> Tensor:
        """A core with its row legs replaced by one leading axis, the looked-up indices."""
        labels = term.topology.core_labels(core)
        row_axes = _row_axes(term, labels)
        shape, fmt = term.core_shape(core), term.formats[core]
        parts = self.core_parts(number, core)
        if row_axes == [0] and self._held is None and not isinstance(fmt, FloatFormat):
            wanted = digits[int(labels[0][1:])]
            return fmt.decode_rows(parts, shape, wanted, self.compute_dtype)
        decoded = self.cores(self.compute_dtype)[number][core] if self._held is not None else None
        if decoded is None:
            decoded = fmt.decode(parts, shape, self.compute_dtype)
        if not row_axes:
            return decoded
        others = [axis for axis in range(len(labels)) if axis not in row_axes]
        moved = decoded.permute(*row_axes, *others)
        return moved[tuple(digits[int(labels[axis][1:])] for axis in row_axes)]

    def materialize(self) -> nn.Module:
        """The dense embedding of the original class, in the original dtype."""
        return self._made_dense(nn.Embedding(self.num_embeddings, self.embedding_dim, self.padding_idx, device="meta"))


def _row_axes(term: TermSpec, labels: tuple[str, ...]) -> list[int]:
    """Axes of a core that are digits of the row index."""
    rows = {f"p{position}" for position in term.layout.axis_positions(0)}
    return [axis for axis, label in enumerate(labels) if label in rows]
