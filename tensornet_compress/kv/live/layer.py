"""The ``transformers`` cache layer of live mode: packed codes of older tokens, exact sinks, an exact recent tail."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from tensornet_compress.coding.fixed_rate import Curve, allocate
from tensornet_compress.coding.planes import UNIT, Planes
from tensornet_compress.kv.cache import row_numbers
from tensornet_compress.kv.live.attention import CodedSide, CodedStates
from tensornet_compress.kv.live.codec import LiveBasis, SideCode, own_basis

_CONTRACTED_QUERIES = 16
"""New tokens up to which contracting with codes costs less than rebuilding keys and values."""


class LiveLayer(DynamicLayer):
    """``keys`` and ``values`` hold the recent tail alone, (batch, heads, tail, width); ``sides`` the sealed tokens before it.

    ``sink_index``: int64 (batch, sinks), the tokens that stay exact, to be known before any are sealed. ``codes``: of keys and
    values; without a profile they are made from the layer's own first tokens, and ``sources`` is what makes them again.
    """

    keys: Tensor
    values: Tensor

    def __init__(self, bits: float, codes: tuple[SideCode, ...], window: int, block: int, contracts: bool):
        super().__init__()
        self.bits, self.window, self.block, self.contracts = bits, window, block, contracts
        self.profiled = self.codes = codes
        self.sources: list[tuple[LiveBasis, Curve]] = []
        self.sides: tuple[CodedSide, ...] = ()
        self.sink_index: Tensor | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append (batch, heads, new, width); returns everything, as ``CodedStates`` where attention may contract with them."""
        keys, values = super().update(key_states, value_states)
        if self.sides:
            new = key_states.shape[2]
            keys, values = (CodedStates(side, part, new) for side, part in zip(self.sides, (keys, values)))
            differentiated = torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad)
            if not self.contracts or new > _CONTRACTED_QUERIES or differentiated:
                keys, values = keys.whole(), values.whole()
        with torch.autocast(key_states.device.type, enabled=False):
            self._seal_ready()
        return keys, values

    def _seal_ready(self) -> None:
        ready = (self.keys.shape[2] - self.window) // self.block * self.block
        if ready <= 0:
            return
        if not self.sides:
            index = self.keys.new_zeros(len(self.keys), 0, dtype=torch.int64) if self.sink_index is None else self.sink_index
            # The sinks of every row must lie in what is sealed first, so that one copy of them serves for good.
            if index.numel() and int(index.max()) >= ready:
                return
            self._begin(index.to(self.keys.device))
        states = self.keys, self.values
        self.sides = tuple(side.append(part[:, :, :ready]) for side, part in zip(self.sides, states))
        self.keys, self.values = (part[:, :, ready:].clone() for part in states)

    def _begin(self, index: Tensor) -> None:
        """Sides without tokens, with copies of the sinks."""
        states = self.keys, self.values
        if not self.codes:
            old = self.keys.shape[2] - self.window
            self.learn([own_basis(part[:, :, :old].detach().cpu()) for part in states])
        places = [index[:, None, :, None].expand(-1, part.shape[1], -1, part.shape[3]) for part in states]
        self.sides = tuple(
            CodedSide(code, Planes(()), 0, part.gather(2, place), index)
            for code, part, place in zip(self.codes, states, places)
        )

    def learn(self, sources: list[tuple[LiveBasis, Curve]]) -> None:
        """Make the codes of keys and values from these."""
        self.sources = sources
        self.codes = tuple(
            SideCode(basis, allocate(basis.deviation, curve, self.bits), curve, len(basis.blocks)) for basis, curve in sources
        )

    @property
    def sealed(self) -> int:
        """Coded tokens."""
        return self.sides[0].tokens if self.sides else 0

    def get_seq_length(self) -> int:
        """Logical tokens, sealed ones included."""
        return super().get_seq_length() + self.sealed

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last ``-tokens_to_remove`` tokens. What a crop leaves of a unit goes back to the tail as decoded; coding it
        again gives the same codes."""
        removed = abs(tokens_to_remove)
        if tokens_to_remove > 0 or removed <= super().get_seq_length() or not self.sides:
            super().crop(tokens_to_remove)
            return
        length = max(0, self.get_seq_length() - removed)
        kept = length // UNIT * UNIT
        index = self.sides[0].index
        if index.numel() and kept <= int(index.max()):
            kept = 0
        whole = [side.rebuild(part.dtype) for side, part in zip(self.sides, (self.keys, self.values))]
        self.keys, self.values = (part[:, :, kept:length].clone() for part in whole)
        self.sides = tuple(side.first(kept // UNIT) for side in self.sides) if kept else ()

    def _pick(self, rows: Tensor) -> None:
        self.sides = tuple(side.select(rows) for side in self.sides)
        if self.sink_index is not None:
            self.sink_index = self.sink_index[rows.cpu()]
        if self.is_initialized:
            self.keys, self.values = (part.index_select(0, rows.to(part.device)) for part in (self.keys, self.values))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows in the order of ``beam_idx``."""
        self._pick(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row ``repeats`` times."""
        if self.is_initialized:
            self._pick(torch.arange(len(self.keys)).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Only the rows ``indices`` (integers or a mask)."""
        self._pick(row_numbers(indices))

    def reset(self) -> None:
        """Empty the layer; codes made from its tokens go too."""
        super().reset()
        self.sides, self.sink_index, self.codes, self.sources = (), None, self.profiled, []

    def offload(self) -> None:
        """Move everything held to the CPU."""
        super().offload()
        self.sides = tuple(side.to(torch.device("cpu")) for side in self.sides)

    def prefetch(self) -> None:
        """Move everything held back to the layer's device."""
        super().prefetch()
        self.sides = tuple(side.to(torch.device(self.device)) for side in self.sides)

    @property
    def payload_nbytes(self) -> int:
        """Bytes of the packed codes."""
        return sum(side.planes.nbytes for side in self.sides)

    @property
    def sink_nbytes(self) -> int:
        """Bytes of the exact sinks and their indices."""
        return sum(side.sinks.nbytes for side in self.sides) + (self.sides[0].index.nbytes if self.sides else 0)
