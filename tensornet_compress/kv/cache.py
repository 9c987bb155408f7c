"""``CompressedCache``: a drop-in ``transformers`` cache that holds sealed blocks instead of keys and values."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING, Cache, DynamicCache

from tensornet_compress.errors import TensorNetError
from tensornet_compress.kv.blocks import Sequence, held_bytes, open_sequence, seal
from tensornet_compress.kv.codec import BlockCodec
from tensornet_compress.kv.layers import WorkingLayer
from tensornet_compress.kv.rope import PositionRecorder, rotary_module, rotary_style

_LARGEST_BLOCK = 1024


@dataclass(frozen=True)
class CacheReport:
    """Where the bytes of a cache are. ``skipped``: layers that keep their own class, with their type."""

    tokens: int
    sealed_tokens: int
    payload_nbytes: int
    sink_nbytes: int
    tail_nbytes: int
    working_nbytes: int
    other_nbytes: int
    exact_nbytes: int
    bits_per_element: float
    skipped: tuple[tuple[int, str], ...]

    @property
    def nbytes(self) -> int:
        """Everything held now."""
        return self.payload_nbytes + self.sink_nbytes + self.tail_nbytes + self.working_nbytes + self.other_nbytes

    def __str__(self) -> str:
        lines = [
            f"{self.tokens} tokens, {self.sealed_tokens} sealed; {self.nbytes:,} bytes held, exact cache {self.exact_nbytes:,}",
            f"  payload {self.payload_nbytes:,}  sinks {self.sink_nbytes:,}  recent tail {self.tail_nbytes:,}  "
            f"decoded working set {self.working_nbytes:,}  other layers {self.other_nbytes:,}",
            f"  {self.bits_per_element:.3f} bits per key/value element, everything counted",
        ]
        lines += [f"  layer {index} keeps its own class: {kind}" for index, kind in self.skipped]
        return "\n".join(lines)


class BlockCache(Cache):
    """A cache over any ``BlockCodec``: exact sinks, sealed blocks, an exact recent tail.

    A block is sealed once, when ``window + block`` tokens lie behind it, and never coded again. From then on attention sees
    what the block decodes to. Decoded tokens stay in a working set until ``freeze``; the next ``update`` decodes them again.
    """

    def __init__(self, model: nn.Module, codec: BlockCodec, *, sinks: int = 4, window: int = 64, block: int = 128):
        for name, value, least in (("sinks", sinks, 0), ("window", window, 0), ("block", block, 1)):
            if value < least:
                raise TensorNetError(f"{name} must be at least {least}, was given {value}")
        self.codec, self.sinks, self.window, self.block = codec, sinks, window, block
        self.sequences: list[Sequence] = []
        self.sealed_length = 0
        self.frozen = False
        self._positions: Tensor | None = None
        self._style = rotary_style(model)
        module = rotary_module(model)
        self._recorder = PositionRecorder(module) if module is not None else None
        if self._recorder is not None:
            weakref.finalize(self, self._recorder.close)
        super().__init__(layers=self._build_layers(model))

    def _build_layers(self, model: nn.Module) -> list[Any]:
        layers = []
        # The stock cache knows which class each layer of this model needs, shared and linear layers included.
        for index, layer in enumerate(DynamicCache(config=model.config.get_text_config(decoder=True)).layers):
            plain = type(layer) is DYNAMIC_LAYER_TYPE_MAPPING["full_attention"]
            layers.append(self.make_layer(index) if plain else layer)
        if not any(isinstance(layer, WorkingLayer) for layer in layers):
            raise TensorNetError("the model has no full-attention layer that caches keys and values; there is nothing to compress")
        return layers

    def make_layer(self, index: int) -> Any:
        """The class of a compressed layer."""
        return WorkingLayer(self, index)

    @property
    def compressed_layers(self) -> list[Any]:
        """The layers this cache compresses, in order."""
        return [layer for layer in self.layers if isinstance(layer, WorkingLayer)]

    def before_update(self, layer: WorkingLayer, key_states: Tensor) -> None:
        """Called by every compressed layer before it appends: thaw, and note positions once per forward pass."""
        compressed = self.compressed_layers
        if layer is not compressed[0]:
            return
        self.thaw()
        batch, _, tokens, _ = key_states.shape
        if not self.sequences:
            self.sequences = [Sequence(0, (), ())] * batch
        if len(self.sequences) != batch:
            raise TensorNetError(f"the cache holds {len(self.sequences)} sequences and was given {batch}; reset it first")
        total = layer.get_seq_length()
        if self._recorder is not None:
            new = self._recorder.positions(tokens).expand(batch, -1).cpu()
        else:
            new = torch.arange(total, total + tokens).expand(batch, -1)
        self._positions = new.clone() if self._positions is None else torch.cat([self._positions, new], 1)
        if not self.sealed_length:
            self.sequences = [Sequence(_first_real(row), (), ()) for row in self._positions]

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
        known = self._positions
        if known is None:
            raise TensorNetError("the cache has tokens without positions; it was filled outside of a forward pass")
        rotary = self._recorder.rotary(self._style) if self._recorder is not None and self._style else None
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
        self._positions = known[:, tokens:]
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
        removed = abs(tokens_to_remove)
        if self._positions is not None and removed:
            self._positions = self._positions[:, : max(0, self._positions.shape[1] - removed)]
        if length < self.sealed_length:
            self.sealed_length = length
            self.sequences = [sequence.cropped(length) for sequence in self.sequences]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows in the order of ``beam_idx`` (rows,)."""
        super().reorder_cache(beam_idx)
        self._pick(beam_idx.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row ``repeats`` times; repeated rows share their blocks."""
        super().batch_repeat_interleave(repeats)
        self._pick([row for row in range(len(self.sequences)) for _ in range(repeats)])

    def batch_select_indices(self, indices: Tensor) -> None:
        """Only the rows ``indices`` (integers or a mask)."""
        super().batch_select_indices(indices)
        chosen = torch.as_tensor(indices).cpu()
        self._pick((torch.nonzero(chosen).flatten() if chosen.dtype == torch.bool else chosen).tolist())

    def _pick(self, rows: list[int]) -> None:
        if self.sequences:
            self.sequences = [self.sequences[row] for row in rows]
        if self._positions is not None:
            self._positions = self._positions[rows]

    def reset(self) -> None:
        """Empty the cache."""
        super().reset()
        self.sequences, self.sealed_length, self._positions, self.frozen = [], 0, None, False

    @property
    def payload_nbytes(self) -> int:
        """Bytes of the sealed blocks."""
        return held_bytes(self.sequences)[0]

    @property
    def nbytes(self) -> int:
        """Bytes of everything held now: blocks, sinks, recent tail, decoded working set, layers of other classes."""
        return self.report().nbytes

    @property
    def bits_per_element(self) -> float:
        """Stored bits per key/value element of the compressed layers: blocks, sinks and tail (not the working set)."""
        return self.report().bits_per_element

    def report(self) -> CacheReport:
        """Where the bytes are."""
        layers = self.compressed_layers
        payload, sinks = held_bytes(self.sequences)
        tokens = layers[0].get_seq_length()
        plain = sum(layer.held_bytes for layer in layers)
        inside = tokens - (self.sealed_length if self.frozen else 0)
        per_token = plain // inside if inside else 0
        tail = per_token * (tokens - self.sealed_length) + (0 if self._positions is None else self._positions.nbytes)
        working = 0 if self.frozen else per_token * self.sealed_length
        elements = sum(_elements_per_token(layer) for layer in layers) * tokens
        skipped = tuple((i, type(layer).__name__) for i, layer in enumerate(self.layers) if layer not in layers)
        other = sum(_plain_bytes(self.layers[i]) for i, _ in skipped)
        itemsize = next((layer.keys.element_size() for layer in layers if layer.is_initialized), 0)
        stored = payload + sinks + tail
        return CacheReport(
            tokens=tokens,
            sealed_tokens=self.sealed_length,
            payload_nbytes=payload,
            sink_nbytes=sinks,
            tail_nbytes=tail,
            working_nbytes=working,
            other_nbytes=other,
            exact_nbytes=elements * itemsize + other,
            bits_per_element=8 * stored / elements if elements else 0.0,
            skipped=skipped,
        )


def _first_real(positions: Tensor) -> int:
    """Index of the first unpadded token of a row: padding repeats a position, real tokens count up from zero."""
    zeros = torch.nonzero(positions == 0).flatten()
    return int(zeros[-1]) if len(zeros) else 0


def _elements_per_token(layer: WorkingLayer) -> int:
    if not layer.is_initialized:
        return 0
    batch, heads, _, width = layer.keys.shape
    return batch * heads * width + batch * heads * layer.values.shape[-1]


def _plain_bytes(layer: Any) -> int:
    return sum(t.nbytes for t in (getattr(layer, "keys", None), getattr(layer, "values", None)) if isinstance(t, Tensor))


@contextmanager
def compressed(
    model: nn.Module, bits: float = 2.0, mode: Literal["live", "storage"] = "live", **options: Any
) -> Iterator[list[Any]]:
    """Inside, every ``model.generate(...)`` without its own cache gets a fresh ``CompressedCache``; the caches are yielded.

    Args:
        bits, mode, options: as for ``CompressedCache``.
    """
    raise NotImplementedError
