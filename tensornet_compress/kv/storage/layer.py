"""The sealed blocks of each sequence, and the ``transformers`` cache layer that holds what they decode to while in use."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from tensornet_compress.kv.rope import Rotary
from tensornet_compress.kv.storage.codec import BlockCodec, Payload


class WorkingLayer(DynamicLayer):
    """Plain keys and values, (batch, heads, tokens, channels), in which sealed tokens hold what their blocks decode to.

    ``dropped``: sealed tokens that are not there, because the cache is frozen.
    """

    keys: Tensor
    values: Tensor
    dropped = 0

    def get_seq_length(self) -> int:
        """Logical tokens, sealed ones included."""
        return super().get_seq_length() + self.dropped

    def drop(self, sealed: int) -> None:
        """Keep only what follows the first ``sealed`` tokens."""
        if self.is_initialized:
            start, self.dropped = sealed - self.dropped, sealed
            self.keys, self.values = self.keys[:, :, start:].clone(), self.values[:, :, start:].clone()

    def refill(self) -> tuple[Tensor, Tensor]:
        """Make room for the dropped tokens; returns the keys and values to be written."""
        room = self.dropped
        self.keys, self.values = (torch.nn.functional.pad(part, (0, 0, room, 0)) for part in (self.keys, self.values))
        self.dropped = 0
        return self.keys[:, :, :room], self.values[:, :, :room]

    def reset(self) -> None:
        """Empty the layer."""
        super().reset()
        self.dropped = 0


@dataclass(frozen=True)
class Block:
    """Tokens ``start .. start + length`` of one sequence.

    ``length`` may be shorter than the payload (a crop inside a block keeps the payload whole). The first ``skipped`` tokens
    are left padding and sinks, which the payload does not hold. ``positions``: rotary positions of the held tokens; an integer
    when they count up from it, else int32 (tokens,).
    """

    start: int
    length: int
    skipped: int
    positions: int | Tensor
    payload: Payload
    rotary: Rotary | None


@dataclass(frozen=True)
class Sequence:
    """One row of the batch: where its real tokens begin, its exact first tokens, and its blocks.

    ``sinks``: per layer a pair (keys, values) of (heads, sinks, channels), as the model gave them (rotary positions on).
    """

    first: int
    sinks: tuple[tuple[Tensor, Tensor], ...] = ()
    blocks: tuple[Block, ...] = ()

    @property
    def protected(self) -> int:
        """Where the exact first tokens end."""
        return self.first + (self.sinks[0][0].shape[1] if self.sinks else 0)

    def cropped(self, length: int) -> Sequence:
        """Only the first ``length`` tokens."""
        kept = tuple(
            replace(block, length=min(block.length, length - block.start)) for block in self.blocks if block.start < length
        )
        hold = max(0, min(self.protected, length) - self.first)
        return Sequence(self.first, tuple((keys[:, :hold], values[:, :hold]) for keys, values in self.sinks), kept)

    def with_sinks(self, keys: list[Tensor], values: list[Tensor], start: int, count: int) -> Sequence:
        """With copies of those of the first ``count`` real tokens that lie in states which begin at ``start``."""
        low, high = max(self.protected, start), min(self.first + count, start + keys[0].shape[1])
        if low >= high:
            return self
        own = slice(low - start, high - start)
        taken = [(k[:, own].clone(), v[:, own].clone()) for k, v in zip(keys, values)]
        if self.sinks:
            taken = [
                (torch.cat([k, more_k], 1), torch.cat([v, more_v], 1)) for (k, v), (more_k, more_v) in zip(self.sinks, taken)
            ]
        return replace(self, sinks=tuple(taken))

    def seal(
        self, codec: BlockCodec, start: int, keys: list[Tensor], values: list[Tensor], positions: Tensor, rotary: Rotary | None
    ) -> Sequence:
        """With one more block.

        Args:
            start: index of the block's first token. keys, values: per layer (heads, tokens, channels), rotary positions on.
            positions: int64 (tokens,).
        """
        tokens = keys[0].shape[1]
        skipped = max(0, min(tokens, self.protected - start))
        held, payload = positions[skipped:], Payload(0, {})
        place: int | Tensor = 0
        if skipped < tokens:
            plain = [k[:, skipped:].float() for k in keys]
            plain = plain if rotary is None else [rotary.unrotate(k, held) for k in plain]
            payload = codec.encode(plain, [v[:, skipped:] for v in values])
            place = int(held[0]) if (held.diff() == 1).all() else held.to("cpu", torch.int32)
        block = Block(start, tokens, skipped, place, payload, rotary if skipped < tokens else None)
        return replace(self, blocks=(*self.blocks, block))

    def write(self, codec: BlockCodec, into: list[tuple[Tensor, Tensor]], start: int = 0) -> None:
        """Write decoded tokens from ``start`` on into per-layer (keys, values) of (heads, tokens, channels) that begin there.

        Padding becomes zero: it is masked, and zero keeps it finite.
        """
        for block in (block for block in self.blocks if block.start >= start):
            held, begin = block.length - block.skipped, block.start - start
            for states in (states for pair in into for states in pair):
                states[:, begin : begin + min(block.skipped, block.length)] = 0
            if held > 0:
                place = slice(begin + block.skipped, begin + block.length)
                where = block.positions
                positions = where[:held] if isinstance(where, Tensor) else torch.arange(where, where + held)
                for (keys, values), plain, value in zip(into, *codec.decode(block.payload)):
                    turned = plain[:, :held] if block.rotary is None else block.rotary.rotate(plain[:, :held], positions)
                    keys[:, place] = turned.to(keys.device, keys.dtype)
                    values[:, place] = value[:, :held].to(values.device, values.dtype)
        for pair, exact in zip(into, self.sinks):
            low, high = max(self.first, start), min(self.protected, start + pair[0].shape[1])
            for states, sinks in zip(pair, exact) if low < high else ():
                states[:, low - start : high - start] = sinks[:, low - self.first : high - self.first]


def held_bytes(sequences: Iterable[Sequence]) -> tuple[int, int]:
    """(payload bytes, sink bytes) of sequences; blocks and sinks that rows share are counted once."""
    payloads: dict[Payload, int] = {}
    sinks: dict[Tensor, int] = {}
    for sequence in sequences:
        for block in sequence.blocks:
            # Start, length, skipped tokens and first position are four-byte integers.
            extra = block.positions.nbytes if isinstance(block.positions, Tensor) else 4
            payloads[block.payload] = block.payload.nbytes + 12 + extra
        sinks |= {keys: keys.nbytes + values.nbytes for keys, values in sequence.sinks}
    return sum(payloads.values()), sum(sinks.values())
