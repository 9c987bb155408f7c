"""The ``transformers`` cache layers of storage mode: a working set of plain tensors over sealed blocks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

if TYPE_CHECKING:
    from tensornet_compress.kv.storage.cache import StorageCache


class WorkingLayer(DynamicLayer):
    """Plain keys and values in which the sealed tokens hold what their blocks decode to.

    ``keys`` and ``values`` are (batch, heads, tokens, channels). While the cache is frozen they hold the tail alone.
    """

    keys: Tensor
    values: Tensor

    def __init__(self, owner: StorageCache, index: int):
        super().__init__()
        self.owner, self.index = owner, index

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append (batch, heads, new, channels); returns everything, as ``DynamicLayer`` does."""
        self.owner.before_update(self, key_states)
        found = super().update(key_states, value_states)
        self.owner.after_update(self)
        return found

    def get_seq_length(self) -> int:
        """Logical tokens, sealed ones included."""
        return super().get_seq_length() + (self.owner.sealed_length if self.owner.frozen else 0)

    def drop_sealed(self) -> None:
        """Keep the tail alone."""
        if self.is_initialized:
            sealed = self.owner.sealed_length
            self.keys, self.values = self.keys[:, :, sealed:].clone(), self.values[:, :, sealed:].clone()

    def restore_sealed(self, keys: Tensor, values: Tensor) -> None:
        """Put decoded sealed tokens before the tail."""
        self.keys, self.values = torch.cat([keys, self.keys], 2), torch.cat([values, self.values], 2)

    @property
    def held_bytes(self) -> int:
        """Bytes of the plain tensors."""
        return self.keys.nbytes + self.values.nbytes if self.is_initialized else 0
