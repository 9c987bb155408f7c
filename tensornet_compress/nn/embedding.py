"""TNEmbedding: rows of a network looked up by index, without forming the whole table."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tensornet_compress.errors import TensorNetError
from tensornet_compress.network import FloatFormat, NetworkSpec, TensorNetwork, TermSpec, plan_contraction
from tensornet_compress.network.network import part_name
from tensornet_compress.nn.module import NetworkModule


class TNEmbedding(NetworkModule):
    """An embedding table (count, width) kept as a network; indices (...) -> vectors (..., width)."""

    def __init__(
        self,
        spec: NetworkSpec,
        stored: dict[str, Tensor] | None = None,
        padding_idx: int | None = None,
        device: torch.device | str | None = None,
    ):
        if len(spec.shape) != 2:
            raise TensorNetError(f"TNEmbedding needs a table of shape (count, width), the network has {spec.shape}")
        super().__init__(spec, stored, device)
        self.num_embeddings, self.embedding_dim = spec.shape
        self.padding_idx = padding_idx

    @classmethod
    def from_embedding(cls, embedding: nn.Embedding, network: TensorNetwork) -> TNEmbedding:
        """Replace an ``nn.Embedding`` by a network of its table.

        Raises:
            TensorNetError: shapes differ, or the embedding renormalises its rows (``max_norm``), which a network cannot.
        """
        if embedding.max_norm is not None:
            raise TensorNetError(f"an embedding with max_norm={embedding.max_norm} rewrites its table; it cannot be compressed")
        if network.spec.shape != tuple(embedding.weight.shape):
            raise TensorNetError(
                f"a table of shape {tuple(embedding.weight.shape)} cannot take a network of shape {network.spec.shape}"
            )
        layer = cls(network.spec, dict(network.stored), embedding.padding_idx)
        return layer.train(embedding.training).to(embedding.weight.device)

    def forward(self, indices: Tensor) -> Tensor:
        """Integer indices (...) -> (..., width) in the replaced module's dtype."""
        flat = indices.reshape(-1)
        rows = [self._rows(number, term, flat) for number, term in enumerate(self.spec.terms)]
        total = rows[0] if len(rows) == 1 else torch.stack(rows).sum(0)
        return total.reshape(*indices.shape, self.embedding_dim)

    def _rows(self, number: int, term: TermSpec, flat: Tensor) -> Tensor:
        layout = term.layout
        order = layout.fibre_order(0)
        if order is not None:
            flat = order.inverse().index(flat.device)[flat]
        digits = dict(zip(layout.axis_positions(0), layout.tensorization.digits(0, flat)))
        operands, labels = [], []
        for core in range(len(term.formats)):
            picked, names = self._picked(number, term, core, digits)
            operands.append(picked)
            labels.append(names)
        columns = tuple(f"p{p}" for p in layout.axis_positions(1))
        sizes = term.sizes() | {"n": len(flat)}
        rows = plan_contraction(labels, ("n", *columns), sizes).run(operands)
        rows = rows.reshape(len(flat), -1)[:, : self.embedding_dim]
        column_order = layout.fibre_order(1)
        return rows if column_order is None else rows[:, column_order.inverse().index(rows.device)]

    def _picked(self, number: int, term: TermSpec, core: int, digits: dict[int, Tensor]) -> tuple[Tensor, tuple[str, ...]]:
        """A core with its row legs replaced by the looked-up indices: tensor and labels."""
        labels = term.topology.core_labels(core)
        row_axes = [axis for axis, label in enumerate(labels) if label[0] == "p" and int(label[1:]) in digits]
        shape, fmt = term.core_shape(core), term.formats[core]
        parts = {part: getattr(self, part_name(number, core, part)) for part in fmt.parts(shape)}
        if row_axes == [0] and self._held is None and not isinstance(fmt, FloatFormat):
            wanted = digits[int(labels[0][1:])]
            return fmt.decode_rows(parts, shape, wanted, self.compute_dtype), ("n", *labels[1:])
        decoded = self.cores(self.compute_dtype)[number][core] if self._held is not None else None
        if decoded is None:
            decoded = fmt.decode(parts, shape, self.compute_dtype)
        if not row_axes:
            return decoded, labels
        others = [axis for axis in range(len(labels)) if axis not in row_axes]
        moved = decoded.permute(*row_axes, *others)
        picked = moved[tuple(digits[int(labels[axis][1:])] for axis in row_axes)]
        return picked, ("n", *(labels[axis] for axis in others))

    def materialize(self) -> nn.Embedding:
        """The dense ``nn.Embedding`` in the original dtype."""
        return nn.Embedding.from_pretrained(self.weight.detach(), freeze=False, padding_idx=self.padding_idx)
