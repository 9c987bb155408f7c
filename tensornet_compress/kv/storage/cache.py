"""Storage mode: sealed blocks of all layers together over a working set of plain tensors, for prefix reuse and multi-turn."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tensornet_compress.errors import CheckpointError, TensorNetError
from tensornet_compress.kv.cache import CompressedCache
from tensornet_compress.kv.files import LARGEST_BLOCK, BlockRecord, CacheRecord
from tensornet_compress.kv.profile.profile import Profile
from tensornet_compress.kv.rope import Rotary
from tensornet_compress.kv.storage.codec import BlockCodec, JointCodec, Payload
from tensornet_compress.kv.storage.layer import Block, Sequence, WorkingLayer, held_bytes
from tensornet_compress.kv.storage.sequence_codec import FreeCodec


class StorageCache(CompressedCache, mode="storage"):
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
        self.sequences: list[Sequence] = []
        self.sealed_length = 0
        super().__init__(model, bits, profile, mode, sinks=sinks, window=window, block=block)
        if codec is not None:
            self.bits = None
        self.compress_layers(lambda _place: WorkingLayer())

    @torch.compiler.disable
    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append to a layer; returns all its keys and values. The first layer thaws, the last one seals what is old enough."""
        if layer_idx == self.indices[0]:
            self.thaw()
            self.note_positions(key_states)
            if not self.sealed_length:
                self.sequences = [Sequence(first) for first in self.first_real()]
        states = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        if layer_idx == self.indices[-1]:
            while (old := self.compressed_layers[0].get_seq_length() - self.sealed_length - self.window) >= self.block:
                self._seal(min(old, max(self.block, LARGEST_BLOCK)) // self.block * self.block)
        return states

    @torch.autocast("cpu", enabled=False)
    def _seal(self, tokens: int) -> None:
        start, end = self.sealed_length, self.sealed_length + tokens
        known = self.positions
        if known is None:
            raise TensorNetError("the cache has tokens without positions; it was filled outside of a forward pass")
        rotary = self.recorder.rotary(self.style) if self.recorder is not None and self.style else None
        layers, sealed = self.compressed_layers, []
        for row, sequence in enumerate(self.sequences):
            keys = [layer.keys[row, :, start:end].detach() for layer in layers]
            values = [layer.values[row, :, start:end].detach() for layer in layers]
            sequence = sequence.with_sinks(keys, values, start, self.sinks)
            sequence = sequence.seal(self.codec, start, keys, values, known[row, :tokens].to(keys[0].device), rotary)
            sequence.write(self.codec, list(zip(keys, values)), start)
            sealed.append(sequence)
        self.sequences = sealed
        self.positions = known[:, tokens:].clone()
        self.sealed_length = end

    def freeze(self) -> None:
        """Drop the decoded working set; what stays are sinks, sealed blocks and the recent tail."""
        for layer in self.compressed_layers:
            layer.drop(self.sealed_length)

    @torch.autocast("cpu", enabled=False)
    def thaw(self) -> None:
        """Decode every sealed block into the working set (also done by the next forward pass)."""
        if self.compressed_layers[0].dropped:
            fresh = [layer.refill() for layer in self.compressed_layers]
            try:
                for row, sequence in enumerate(self.sequences):
                    sequence.write(self.codec, [(keys[row], values[row]) for keys, values in fresh])
            except (KeyError, IndexError, RuntimeError) as error:
                raise CheckpointError(f"a block of the cache cannot be decoded; its file was damaged: {error}") from error

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
        self.sequences, self.sealed_length = [], 0

    def _held(self) -> dict[str, int]:
        payload, sinks = held_bytes(self.sequences)
        plain = super()._held()["tail_nbytes"]
        first = self.compressed_layers[0]
        inside = first.get_seq_length() - first.dropped
        working = plain // max(inside, 1) * (self.sealed_length - first.dropped)
        return {
            "sealed_tokens": self.sealed_length,
            "payload_nbytes": payload,
            "sink_nbytes": sinks,
            "tail_nbytes": plain - working,
            "working_nbytes": working,
            "shared_nbytes": self.profile.nbytes if self.profile is not None else 0,
        }

    def _stored(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        if self.bits is None:
            raise TensorNetError("a cache with a codec of its own cannot be saved; use bits and profile")
        tensors, fields = super()._stored()
        payloads: dict[Payload, int] = {}
        rotaries: list[Rotary] = []
        blocks: list[list[BlockRecord]] = []
        for row, sequence in enumerate(self.sequences):
            blocks.append([])
            for place, block in enumerate(sequence.blocks):
                position = block.positions if isinstance(block.positions, int) else None
                if isinstance(block.positions, Tensor):
                    tensors[f"positions{row}.{place}"] = block.positions
                turn = None if block.rotary is None else _number(rotaries, block.rotary)
                number = payloads.setdefault(block.payload, len(payloads))
                own = {"start": block.start, "length": block.length, "skipped": block.skipped, "tokens": block.payload.tokens}
                blocks[-1].append(BlockRecord(**own, position=position, payload=number, rotary=turn))
            for place, (keys, values) in enumerate(sequence.sinks):
                tensors |= {f"sink{row}.{place}.keys": keys, f"sink{row}.{place}.values": values}
        for payload, number in payloads.items():
            tensors |= {f"payload{number}.{name}": part for name, part in payload.tensors.items()}
        tensors |= {f"rotary{number}": rotary.frequencies for number, rotary in enumerate(rotaries)}
        for place, layer in enumerate(self.compressed_layers):
            begin = self.sealed_length - layer.dropped
            tensors |= {f"tail{place}.keys": layer.keys[:, :, begin:], f"tail{place}.values": layer.values[:, :, begin:]}
        return tensors, fields | {
            "sealed": [self.sealed_length] * len(self.compressed_layers),
            "first": [sequence.first for sequence in self.sequences],
            "rotary_style": [rotary.style for rotary in rotaries],
            "blocks": blocks,
        }

    def _restore(self, record: CacheRecord, tensors: dict[str, Tensor], model: nn.Module, whole: bool) -> None:
        super()._restore(record, tensors, model, whole)
        if record.first and len(record.first) != self.batch:
            raise CheckpointError(f"{len(record.first)} sequences have blocks, {self.batch} have a tail")
        parts: dict[str, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            owner, _, part = name.partition(".")
            parts.setdefault(owner, {})[part] = tensor
        rotaries = [Rotary(tensors[f"rotary{number}"], style) for number, style in enumerate(record.rotary_style)]
        payloads: dict[int, Payload] = {}
        for row, (first, records) in enumerate(zip(record.first, record.blocks)):
            blocks = []
            for place, saved in enumerate(records):
                payload = payloads.setdefault(saved.payload, Payload(saved.tokens, parts.get(f"payload{saved.payload}", {})))
                positions = tensors[f"positions{row}.{place}"] if saved.position is None else saved.position
                rotary = None if saved.rotary is None else rotaries[saved.rotary]
                if payload.tokens != saved.tokens or (isinstance(positions, Tensor) and positions.shape != (saved.tokens,)):
                    raise CheckpointError(f"block {place} of row {row} and its payload or positions differ in tokens")
                blocks.append(Block(saved.start, saved.length, saved.skipped, positions, payload, rotary))
            names = [f"sink{row}.{place}" for place in range(len(self.compressed_layers))]
            sinks = tuple((tensors[f"{name}.keys"], tensors[f"{name}.values"]) for name in names if f"{name}.keys" in tensors)
            self.sequences.append(Sequence(first, sinks, tuple(blocks)))
            self._check_sinks(sinks, record)
        for payload in payloads.values():
            self._check_payload(payload, whole)
        self.sealed_length = record.sealed[0]
        for layer in self.compressed_layers:
            layer.dropped = self.sealed_length

    def _check_sinks(self, sinks: tuple[tuple[Tensor, Tensor], ...], record: CacheRecord) -> None:
        """Refuse sinks that do not have the shape of the layers' states."""
        for pair, layer in zip(sinks, self.compressed_layers):
            for part, states in zip(pair, (layer.keys, layer.values)):
                heads, tokens, width = part.shape
                if (heads, width) != (states.shape[1], states.shape[3]) or tokens > min(record.sinks, record.sealed[0]):
                    raise CheckpointError(f"exact first tokens have shape {tuple(part.shape)}, unlike the layers' states")
        if sinks and (len(sinks) != len(self.compressed_layers) or len({k.shape[1] for pair in sinks for k in pair}) > 1):
            raise CheckpointError("exact first tokens are not there for all layers alike")

    def _check_payload(self, payload: Payload, whole: bool) -> None:
        """Refuse a payload that no block can have; one that no hash vouches for is decoded."""
        if not payload.tokens:
            return
        step = payload.tensors["step"]
        if step.numel() != 1 or not 0 < float(step) < float("inf"):
            raise CheckpointError(f"a block has the quantisation step {step.flatten()[:2].tolist()}")
        if not whole:
            states = self.codec.decode(payload)
            for layer, keys, values in zip(self.compressed_layers, *states, strict=True):
                heads, width = layer.keys.shape[1], layer.keys.shape[3]
                if keys.shape != (heads, payload.tokens, width) or len(values) != heads:
                    raise CheckpointError(f"a block decodes to keys of shape {tuple(keys.shape)}, unlike the layers' states")


def _number(rotaries: list[Rotary], rotary: Rotary) -> int:
    """Where a rotation stands in the list, to which a new one is added."""
    for number, known in enumerate(rotaries):
        if known.same_as(rotary):
            return number
    rotaries.append(rotary)
    return len(rotaries) - 1
