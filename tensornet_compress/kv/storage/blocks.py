"""The sealed part of a cache: per sequence a list of immutable blocks, and the rules that every cache operation follows."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tensornet_compress.kv.payload import BlockCodec, Payload
from tensornet_compress.kv.rope import Rotary


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
    sinks: tuple[tuple[Tensor, Tensor], ...]
    blocks: tuple[Block, ...]

    def cropped(self, length: int) -> Sequence:
        """Only the first ``length`` tokens."""
        kept = tuple(
            replace(block, length=min(block.length, length - block.start)) for block in self.blocks if block.start < length
        )
        hold = max(0, min(self.sinks[0][0].shape[1] if self.sinks else 0, length - self.first))
        return Sequence(self.first, tuple((k[:, :hold], v[:, :hold]) for k, v in self.sinks), kept)


def seal(
    codec: BlockCodec,
    sequence: Sequence,
    start: int,
    keys: list[Tensor],
    values: list[Tensor],
    positions: Tensor,
    rotary: Rotary | None,
) -> Sequence:
    """Append a block to a sequence.

    Args:
        start: index of the block's first token. keys, values: per layer (heads, tokens, channels), rotary positions on.
        positions: int64 (tokens,).
    """
    tokens = keys[0].shape[1]
    protected = sequence.first + (sequence.sinks[0][0].shape[1] if sequence.sinks else 0)
    skipped = max(0, min(tokens, protected - start))
    held = positions[skipped:]
    if skipped == tokens:
        return replace(sequence, blocks=(*sequence.blocks, Block(start, tokens, skipped, 0, Payload(0, {}), None)))
    plain = [k[:, skipped:].float() for k in keys]
    if rotary is not None:
        plain = [rotary.unrotate(k, held) for k in plain]
    payload = codec.encode(plain, [v[:, skipped:] for v in values])
    counting = bool((held.diff() == 1).all())
    block = Block(start, tokens, skipped, int(held[0]) if counting else held.to("cpu", torch.int32), payload, rotary)
    return replace(sequence, blocks=(*sequence.blocks, block))


def open_sequence(codec: BlockCodec, sequence: Sequence, into: list[tuple[Tensor, Tensor]], start: int = 0) -> None:
    """Write decoded tokens from ``start`` on into per-layer (keys, values) of (heads, tokens, channels) that begin at
    ``start``.

    Padding becomes zero: it is masked, and zero keeps it finite.
    """
    for block in sequence.blocks:
        if block.start < start:
            continue
        held = block.length - block.skipped
        begin = block.start - start
        for keys, values in into:
            keys[:, begin : begin + min(block.skipped, block.length)] = 0
            values[:, begin : begin + min(block.skipped, block.length)] = 0
        if held > 0:
            place = slice(begin + block.skipped, begin + block.length)
            decoded = codec.decode(block.payload)
            where = block.positions
            positions = where[:held] if isinstance(where, Tensor) else torch.arange(where, where + held)
            for (keys, values), plain, value in zip(into, *decoded):
                turned = plain[:, :held] if block.rotary is None else block.rotary.rotate(plain[:, :held], positions)
                keys[:, place] = turned.to(keys.device, keys.dtype)
                values[:, place] = value[:, :held].to(values.device, values.dtype)
    end = start + into[0][0].shape[1] if into else start
    for (keys, values), (sink_keys, sink_values) in zip(into, sequence.sinks):
        low, high = max(sequence.first, start), min(sequence.first + sink_keys.shape[1], end)
        if low < high:
            keys[:, low - start : high - start] = sink_keys[:, low - sequence.first : high - sequence.first]
            values[:, low - start : high - start] = sink_values[:, low - sequence.first : high - sequence.first]


def held_bytes(sequences: Iterable[Sequence]) -> tuple[int, int]:
    """(payload bytes, sink bytes) of sequences; blocks and sinks that rows share are counted once."""
    payloads: dict[int, int] = {}
    sinks: dict[int, int] = {}
    for sequence in sequences:
        for block in sequence.blocks:
            # Start, length, skipped tokens and first position are four-byte integers.
            extra = block.positions.nbytes if isinstance(block.positions, Tensor) else 4
            payloads[id(block.payload)] = block.payload.nbytes + 12 + extra
        for keys, values in sequence.sinks:
            sinks[id(keys)] = keys.nbytes + values.nbytes
    return sum(payloads.values()), sum(sinks.values())
