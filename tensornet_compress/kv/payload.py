"""What every cache codec offers, the payload it gives, and the identity codec that the conformance tests compare with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class Payload:
    """One sealed block of one sequence: named tensors and the number of tokens they hold. Immutable, so beams may share it."""

    tokens: int
    tensors: dict[str, Tensor]

    @property
    def nbytes(self) -> int:
        """Bytes held, with four for the token count."""
        return 4 + sum(tensor.nbytes for tensor in self.tensors.values())


class BlockCodec(Protocol):
    """Codes blocks of tokens of all compressed layers together."""

    def encode(self, keys: list[Tensor], values: list[Tensor]) -> Payload:
        """Plain keys and values, per layer (heads, tokens, channels), -> payload."""
        ...

    def decode(self, payload: Payload) -> tuple[list[Tensor], list[Tensor]]:
        """Payload -> plain keys and values, per layer fp32 (heads, tokens, channels)."""
        ...


class IdentityCodec:
    """Keeps everything exact. The reference of the conformance tests; it compresses nothing."""

    def encode(self, keys: list[Tensor], values: list[Tensor]) -> Payload:
        """See ``BlockCodec``."""
        named = {f"key{i}": k.clone() for i, k in enumerate(keys)} | {f"value{i}": v.clone() for i, v in enumerate(values)}
        return Payload(keys[0].shape[1], named)

    def decode(self, payload: Payload) -> tuple[list[Tensor], list[Tensor]]:
        """See ``BlockCodec``."""
        count = len(payload.tensors) // 2
        return [payload.tensors[f"key{i}"] for i in range(count)], [payload.tensors[f"value{i}"] for i in range(count)]


def row_payload(tokens: int, **tensors: Tensor) -> Payload:
    """A payload of CPU tensors."""
    return Payload(tokens, {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()})


def scalar(value: float) -> Tensor:
    """A float as a stored fp32 tensor of one element."""
    return torch.tensor([value], dtype=torch.float32)
