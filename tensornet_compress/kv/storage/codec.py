"""How a storage cache codes blocks of all layers together: the interface of its codecs, and the calibrated one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from tensornet_compress.coding.rans import lane_count
from tensornet_compress.errors import TensorNetError
from tensornet_compress.frozen import Shared
from tensornet_compress.kv.profile.profile import SIDES, Profile
from tensornet_compress.kv.profile.tree import layers_of, rows_of

_RATE_ROWS = 192
_RATE_STEPS = 5


@dataclass(frozen=True, eq=False)
class Payload(Shared):
    """One sealed block of one sequence: named tensors and the number of tokens they hold. Immutable, so beams may share it."""

    tokens: int
    tensors: dict[str, Tensor]

    @staticmethod
    def of(tokens: int, **tensors: Tensor) -> Payload:
        """A payload on the processor."""
        return Payload(tokens, {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})

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
    """Keeps everything exact: a cache that compresses nothing, for tests and as a reference.

    >>> codec, states = IdentityCodec(), [torch.randn(2, 5, 8)]
    >>> keys, values = codec.decode(codec.encode(states, states))
    >>> torch.equal(keys[0], states[0])
    True
    """

    def encode(self, keys: list[Tensor], values: list[Tensor]) -> Payload:
        """See ``BlockCodec``."""
        named = {f"key{i}": k.clone() for i, k in enumerate(keys)} | {f"value{i}": v.clone() for i, v in enumerate(values)}
        return Payload(keys[0].shape[1], named)

    def decode(self, payload: Payload) -> tuple[list[Tensor], list[Tensor]]:
        """See ``BlockCodec``."""
        count = len(payload.tensors) // 2
        return [payload.tensors[f"key{i}"] for i in range(count)], [payload.tensors[f"value{i}"] for i in range(count)]


class JointCodec:
    """Codes all layers together in the tree of a profile, with one step for everything, entropy-coded.

    ``rate_control`` fits the step of each block so that its payload meets the target on this very text; without it every block
    takes the calibrated step.
    """

    def __init__(self, profile: Profile, bits: float, rate_control: bool = True):
        self.profile, self.bits, self.rate_control = profile, bits, rate_control
        self.calibrated_step = profile.step(bits)
        self._scale = torch.cat([profile.scale[side] for side in SIDES])

    def encode(self, keys: list[Tensor], values: list[Tensor]) -> Payload:
        """See ``BlockCodec``.

        Raises:
            TensorNetError: layers or heads are not those of the profile, or numbers are not finite.
        """
        if [len(k) for k in keys] != self.profile.spec.heads:
            raise TensorNetError(
                f"the cache has heads {[len(k) for k in keys]} per layer, the profile was made for {self.profile.spec.heads}"
            )
        rows = [rows_of([layer.float().cpu() for layer in states]) for states in (keys, values)]
        coefficients = torch.cat([self.profile.trees[side].analyse(own) for side, own in zip(SIDES, rows)], 1)
        step = torch.tensor([self._fit_step(coefficients) if self.rate_control else self.calibrated_step])
        coded, escaped = self.profile.quantiser.encode(coefficients, self._scale, float(step))
        return Payload.of(len(coefficients), coded=coded, escaped=escaped, step=step)

    def decode(self, payload: Payload) -> tuple[list[Tensor], list[Tensor]]:
        """See ``BlockCodec``."""
        stored = payload.tensors
        coefficients = self.profile.quantiser.decode(
            stored["coded"], stored["escaped"], self._scale, float(stored["step"]), payload.tokens
        )
        trees = [self.profile.trees[side] for side in SIDES]
        parts = coefficients.split([tree.components for tree in trees], 1)
        states = [layers_of(tree.synthesise(part), self.profile.spec.heads, tree.width) for tree, part in zip(trees, parts)]
        return states[0], states[1]

    def _fit_step(self, coefficients: Tensor) -> float:
        """Secant search on log(step) for the target rate, measured on a strided sample of the block."""
        sample = coefficients[:: max(1, len(coefficients) // _RATE_ROWS)]
        elements = self.profile.elements_per_token
        lanes = 32 * lane_count(coefficients.numel()) / coefficients.numel()

        def excess(step: float) -> float:
            return self.profile.quantiser.bits(sample, self._scale, step) / (len(sample) * elements) + lanes - self.bits

        step, slope = self.calibrated_step, -0.8
        here = excess(step)
        for _ in range(_RATE_STEPS):
            if -0.005 * self.bits < here <= 0:
                break
            ahead = step * 2.0 ** max(-2.0, min(2.0, -(here + 0.002 * self.bits) / slope))
            there = excess(ahead)
            moved = torch.tensor(ahead / step).log2().item()
            if abs(moved) > 1e-6 and there != here:
                slope = min(-0.05, (there - here) / moved)
            step, here = ahead, there
        return step
