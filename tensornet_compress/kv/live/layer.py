"""The ``transformers`` cache layer of live mode: packed planes, exact sinks, an exact recent tail."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from tensornet_compress.coding.planes import UNIT, Planes
from tensornet_compress.kv.live.codec import SideCode

if TYPE_CHECKING:
    from tensornet_compress.kv.live.cache import LiveCache


@dataclass(frozen=True)
class LiveView:
    """What attention contracts against: an immutable snapshot of one layer's sealed tokens.

    ``sink_keys``, ``sink_values``: (batch, heads, sinks, width), exact; they overlay tokens ``sink_index`` (batch, sinks).
    """

    key_code: SideCode
    value_code: SideCode
    keys: Planes
    values: Planes
    tokens: int
    sink_keys: Tensor
    sink_values: Tensor
    sink_index: Tensor

    def rebuild(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Sealed keys and values, (batch, heads, tokens, width)."""
        out = []
        for code, packed, sinks in (
            (self.key_code, self.keys, self.sink_keys),
            (self.value_code, self.values, self.sink_values),
        ):
            whole = torch.cat([code.decode(chunk).to(dtype) for chunk in packed.chunks], 2)
            index = self.sink_index[:, None, :, None].expand(-1, whole.shape[1], -1, whole.shape[3])
            out.append(whole.scatter_(2, index, sinks.to(dtype)))
        return out[0], out[1]


class LiveLayer(DynamicLayer):
    """``keys`` and ``values`` hold the recent tail alone, (batch, heads, tail, width); sealed tokens are packed codes."""

    keys: Tensor
    values: Tensor

    def __init__(self, owner: LiveCache, index: int):
        super().__init__()
        self.owner, self.index = owner, index
        self._clear()

    def _clear(self) -> None:
        self.sealed = 0
        self.packed_keys: Planes | None = None
        self.packed_values: Planes | None = None
        self.sink_keys: Tensor | None = None
        self.sink_values: Tensor | None = None
        self.sink_index: Tensor | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append (batch, heads, new, width). Returns everything rebuilt, or, where the contracting attention reads this layer,
        the exact tail with the sealed tokens attached as a ``LiveView``."""
        self.owner.before_update(self, key_states)
        tail_keys, tail_values = super().update(key_states, value_states)
        view = self.view()
        if view is None:
            found = tail_keys, tail_values
        elif self.owner.contracts(self, key_states.shape[2]):
            found = attach(tail_keys, view), tail_values
        else:
            keys, values = view.rebuild(key_states.dtype)
            found = torch.cat([keys, tail_keys], 2), torch.cat([values, tail_values], 2)
        self._seal_ready()
        return found

    def view(self) -> LiveView | None:
        """The sealed tokens now; ``None`` when there are none."""
        if self.packed_keys is None or self.packed_values is None:
            return None
        if self.sink_keys is None or self.sink_values is None or self.sink_index is None:
            return None
        key_code, value_code = self.owner.codes_of(self)
        return LiveView(
            key_code,
            value_code,
            self.packed_keys,
            self.packed_values,
            self.sealed,
            self.sink_keys,
            self.sink_values,
            self.sink_index,
        )

    def _seal_ready(self) -> None:
        ready = (self.keys.shape[2] - self.owner.window) // self.owner.block * self.owner.block
        if ready <= 0:
            return
        if self.sealed == 0:
            # The sinks of every row must lie in what is sealed first, so that one copy of them serves for good.
            self.sink_index = self.owner.sink_index().to(self.keys.device)
            if self.sink_index.numel():
                need = int(self.sink_index.max()) + 1
                if need > ready:
                    return
            self._copy_sinks()
        key_code, value_code = self.owner.codes_of(self)
        self.packed_keys = (self.packed_keys or Planes(())).append(key_code.encode(self.keys[:, :, :ready]))
        self.packed_values = (self.packed_values or Planes(())).append(value_code.encode(self.values[:, :, :ready]))
        self.sealed += ready
        self.keys, self.values = self.keys[:, :, ready:].clone(), self.values[:, :, ready:].clone()

    def _copy_sinks(self) -> None:
        if self.sink_index is None:
            return
        index = self.sink_index[:, None, :, None]
        self.sink_keys = self.keys.gather(2, index.expand(-1, self.keys.shape[1], -1, self.keys.shape[3]))
        self.sink_values = self.values.gather(2, index.expand(-1, self.values.shape[1], -1, self.values.shape[3]))

    def get_seq_length(self) -> int:
        """Logical tokens, sealed ones included."""
        return super().get_seq_length() + self.sealed

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(length, offset) that masks are built for."""
        return self.get_seq_length() + query_length, 0

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last ``-tokens_to_remove`` tokens. What a crop leaves of a unit goes back to the tail as decoded; coding it
        again gives the same codes."""
        removed = abs(tokens_to_remove)
        tail = super().get_seq_length()
        view = self.view()
        if tokens_to_remove > 0 or removed <= tail or view is None:
            super().crop(tokens_to_remove)
            return
        length = max(0, self.get_seq_length() - removed)
        keys, values = view.rebuild(self.keys.dtype)
        kept = length // UNIT * UNIT
        if kept < int(view.sink_index.max() if view.sink_index.numel() else 0) + 1:
            kept = 0
        self.keys, self.values = keys[:, :, kept:length].clone(), values[:, :, kept:length].clone()
        if kept:
            self.packed_keys, self.packed_values = view.keys.first(kept // UNIT), view.values.first(kept // UNIT)
            self.sealed = kept
        else:
            self._clear()

    def _pick(self, rows: Tensor) -> None:
        if self.packed_keys is not None and self.packed_values is not None:
            self.packed_keys, self.packed_values = self.packed_keys.select(rows), self.packed_values.select(rows)
        for name in ("sink_keys", "sink_values", "sink_index"):
            held = getattr(self, name)
            if held is not None:
                setattr(self, name, held.index_select(0, rows.to(held.device)))
        if self.is_initialized:
            self.keys = self.keys.index_select(0, rows.to(self.keys.device))
            self.values = self.values.index_select(0, rows.to(self.values.device))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows in the order of ``beam_idx``."""
        self._pick(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row ``repeats`` times."""
        if self.is_initialized:
            self._pick(torch.arange(len(self.keys)).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Only the rows ``indices`` (integers or a mask)."""
        chosen = torch.as_tensor(indices)
        self._pick(torch.nonzero(chosen).flatten() if chosen.dtype == torch.bool else chosen)

    def reset(self) -> None:
        """Empty the layer."""
        super().reset()
        self._clear()

    def offload(self) -> None:
        """Move everything held to the CPU."""
        super().offload()
        self._move(torch.device("cpu"))

    def prefetch(self) -> None:
        """Move everything held back to the layer's device."""
        super().prefetch()
        if self.is_initialized:
            self._move(torch.device(self.device))

    def _move(self, device: torch.device) -> None:
        for name in ("packed_keys", "packed_values"):
            held = getattr(self, name)
            if held is not None:
                setattr(self, name, held.to(device))
        for name in ("sink_keys", "sink_values", "sink_index"):
            if getattr(self, name) is not None:
                setattr(self, name, getattr(self, name).to(device, non_blocking=True))

    @property
    def payload_nbytes(self) -> int:
        """Bytes of the packed codes."""
        return sum(held.nbytes for held in (self.packed_keys, self.packed_values) if held is not None)

    @property
    def sink_nbytes(self) -> int:
        """Bytes of the exact sinks and their indices."""
        held = (self.sink_keys, self.sink_values, self.sink_index)
        return sum(t.nbytes for t in held if t is not None)

    @property
    def held_bytes(self) -> int:
        """Bytes of the exact tail."""
        return self.keys.nbytes + self.values.nbytes if self.is_initialized else 0


_ATTACHED = "_tensornet_live_view"


def attach(keys: Tensor, view: LiveView) -> Tensor:
    """A view of the tail's keys that carries the sealed tokens to the attention function."""
    carrier = keys.view_as(keys)
    setattr(carrier, _ATTACHED, view)
    return carrier


def attached(keys: Tensor) -> LiveView | None:
    """What ``attach`` put on these keys."""
    return getattr(keys, _ATTACHED, None)
