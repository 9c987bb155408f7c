"""Storage mode: sealed blocks of all layers together over a working set of plain tensors, for prefix reuse and multi-turn."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tensornet_compress.errors import TensorNetError
from tensornet_compress.kv.cache import CacheReport, CompressedCache
from tensornet_compress.kv.payload import BlockCodec
from tensornet_compress.kv.profile.profile import Profile
from tensornet_compress.kv.storage.blocks import Sequence, held_bytes, open_sequence, seal
from tensornet_compress.kv.storage.codec import JointCodec
from tensornet_compress.kv.storage.layer import WorkingLayer
from tensornet_compress.kv.storage.sequence_codec import FreeCodec

_LARGEST_BLOCK = 1024


class StorageCache(CompressedCache):
    """Exact sinks, sealed blocks, an exact recent tail, and a working set while in use.

    A block is sealed once, when ``window + block`` tokens lie behind it, and never coded again. From then on attention sees
    what the block decodes to. Decoded tokens stay in a working set until ``freeze``; the next ``update`` decodes them again.
    """

    def __init__(
        self,
        model: nn.Module,
        bits: float = 2.0,
        profile: Profile | None = None,
        mode: str = "storage",
        *,
        sinks: int = 4,
        window: int = 64,
        block: int = 128,
        codec: BlockCodec | None = None,
    ):
        """``codec`` overrides what ``bits`` and ``profile`` would choose."""
        self.codec: BlockCodec = codec or (JointCodec(profile, bits) if profile is not None else FreeCodec(bits))
        self.bits = None if codec is not None else bits
        self.sequences: list[Sequence] = []
        self.sealed_length = 0
        self.frozen = False
        super().__init__(model, bits, profile, mode, sinks=sinks, window=window, block=block)

    def make_layer(self, index: int) -> Any:
        """See ``CompressedCache``."""
        return WorkingLayer(self, index)

    def before_update(self, layer: WorkingLayer, key_states: Tensor) -> None:
        """Called by every compressed layer before it appends: thaw, and note positions once per forward pass."""
        if layer is not self.compressed_layers[0]:
            return
        self.thaw()
        self.note_positions(layer, len(key_states), key_states.shape[2])
        if not self.sealed_length:
            self.sequences = [Sequence(first, (), ()) for first in self.first_real()]

    def after_update(self, layer: WorkingLayer) -> None:
        """Called by every compressed layer after it appended: the last one seals what has become old enough."""
        if layer is self.compressed_layers[-1]:
            self._seal_ready(layer.keys.shape[2])

    def _seal_ready(self, length: int) -> None:
        while length - self.sealed_length >= self.window + self.block:
            ready = (length - self.sealed_length - self.window) // self.block * self.block
            self._seal(min(ready, max(self.block, _LARGEST_BLOCK // self.block * self.block)))

    def _seal(self, tokens: int) -> None:
        start, end = self.sealed_length, self.sealed_length + tokens
        known = self.positions
        if known is None:
            raise TensorNetError("the cache has tokens without positions; it was filled outside of a forward pass")
        rotary = self.recorder.rotary(self.style) if self.recorder is not None and self.style else None
        layers = self.compressed_layers
        sealed = []
        for row, sequence in enumerate(self.sequences):
            sequence = self._take_sinks(sequence, row, start, end)
            keys = [layer.keys[row, :, start:end] for layer in layers]
            values = [layer.values[row, :, start:end] for layer in layers]
            positions = known[row, :tokens].to(keys[0].device)
            sequence = seal(self.codec, sequence, start, keys, values, positions, rotary)
            open_sequence(self.codec, sequence, list(zip(keys, values)), start)
            sealed.append(sequence)
        self.sequences = sealed
        self.positions = known[:, tokens:].clone()
        self.sealed_length = end

    def _take_sinks(self, sequence: Sequence, row: int, start: int, end: int) -> Sequence:
        """Copy the sinks that fall into [start, end) before their block is sealed."""
        held = sequence.sinks[0][0].shape[1] if sequence.sinks else 0
        low, high = max(sequence.first + held, start), min(sequence.first + self.sinks, end)
        if low >= high:
            return sequence
        taken = [
            (layer.keys[row, :, low:high].clone(), layer.values[row, :, low:high].clone()) for layer in self.compressed_layers
        ]
        if sequence.sinks:
            taken = [
                (torch.cat([old[0], new[0]], 1), torch.cat([old[1], new[1]], 1)) for old, new in zip(sequence.sinks, taken)
            ]
        return Sequence(sequence.first, tuple(taken), sequence.blocks)

    def freeze(self) -> None:
        """Drop the decoded working set; what stays are sinks, sealed blocks and the recent tail."""
        if not self.frozen:
            for layer in self.compressed_layers:
                layer.drop_sealed()
            self.frozen = True

    def thaw(self) -> None:
        """Decode every sealed block into the working set (also done by the next forward pass)."""
        if not self.frozen:
            return
        self.frozen = False
        layers = self.compressed_layers
        if not self.sealed_length:
            return
        shape = (len(self.sequences), self.sealed_length)
        fresh = [
            (
                layer.keys.new_zeros(shape[0], layer.keys.shape[1], shape[1], layer.keys.shape[3]),
                layer.values.new_zeros(shape[0], layer.values.shape[1], shape[1], layer.values.shape[3]),
            )
            for layer in layers
        ]
        for row, sequence in enumerate(self.sequences):
            open_sequence(self.codec, sequence, [(k[row], v[row]) for k, v in fresh])
        for layer, (keys, values) in zip(layers, fresh):
            layer.restore_sealed(keys, values)

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last ``-tokens_to_remove`` tokens, also when that reaches into sealed blocks."""
        self.thaw()
        super().crop(tokens_to_remove)
        length = self.compressed_layers[0].get_seq_length()
        if length < self.sealed_length:
            self.sealed_length = length
            self.sequences = [sequence.cropped(length) for sequence in self.sequences]

    def pick_rows(self, rows: list[int]) -> None:
        """See ``CompressedCache``; repeated rows share their blocks."""
        super().pick_rows(rows)
        if self.sequences:
            self.sequences = [self.sequences[row] for row in rows]

    def reset(self) -> None:
        """Empty the cache."""
        super().reset()
        self.sequences, self.sealed_length, self.frozen = [], 0, False

    def report(self) -> CacheReport:
        """Where the bytes are."""
        payload, sinks = held_bytes(self.sequences)
        plain = sum(layer.held_bytes for layer in self.compressed_layers)
        inside = self.compressed_layers[0].get_seq_length() - (self.sealed_length if self.frozen else 0)
        working = 0 if self.frozen or not inside else plain // inside * self.sealed_length
        return self.make_report(
            sealed=self.sealed_length,
            payload=payload,
            sinks=sinks,
            tail=plain - working,
            working=working,
            basis=0,
            shared=self.profile.nbytes if self.profile is not None else 0,
        )
