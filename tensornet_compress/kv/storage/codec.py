"""The calibrated codec of ``mode="storage"``: the tree over all layers, one step for everything, entropy-coded."""

from __future__ import annotations

import torch
from torch import Tensor

from tensornet_compress.coding.rans import lane_count
from tensornet_compress.errors import TensorNetError
from tensornet_compress.kv.payload import Payload, row_payload, scalar
from tensornet_compress.kv.profile.moments import layers_of, rows_of
from tensornet_compress.kv.profile.profile import SIDES, Profile

_RATE_ROWS = 192
_RATE_STEPS = 5


class JointCodec:
    """Codes all layers together with a profile. ``rate_control`` fits the step of each block so that its payload meets the
    target on this very text; without it every block takes the calibrated step."""

    def __init__(self, profile: Profile, bits: float, rate_control: bool = True):
        self.profile, self.bits, self.rate_control = profile, bits, rate_control
        self.calibrated_step = profile.step(bits)
        self._scale = torch.cat([profile.scale[side] for side in SIDES])
        self._counts = [profile.trees[side].components for side in SIDES]

    def encode(self, keys: list[Tensor], values: list[Tensor]) -> Payload:
        """Plain keys and values, per layer (heads, tokens, channels), -> payload.

        Raises:
            TensorNetError: layers or heads are not those of the profile, or numbers are not finite.
        """
        if [len(k) for k in keys] != self.profile.spec.heads:
            raise TensorNetError(
                f"the cache has heads {[len(k) for k in keys]} per layer, the profile was made for {self.profile.spec.heads}"
            )
        rows = {"key": rows_of([k.float().cpu() for k in keys]), "value": rows_of([v.float().cpu() for v in values])}
        coefficients = torch.cat([self.profile.trees[side].analyse(rows[side]) for side in SIDES], 1)
        step = self._fit_step(coefficients) if self.rate_control else self.calibrated_step
        step = float(scalar(step))
        coded, escaped = self.profile.quantiser.encode(coefficients, self._scale, step)
        return row_payload(len(coefficients), coded=coded, escaped=escaped, step=scalar(step))

    def decode(self, payload: Payload) -> tuple[list[Tensor], list[Tensor]]:
        """Payload -> plain keys and values, per layer fp32 (heads, tokens, channels)."""
        stored = payload.tensors
        coefficients = self.profile.quantiser.decode(
            stored["coded"], stored["escaped"], self._scale, float(stored["step"]), payload.tokens
        )
        parts = dict(zip(SIDES, coefficients.split(self._counts, 1)))
        states = [
            layers_of(
                self.profile.trees[side].synthesise(parts[side]),
                self.profile.spec.heads,
                self.profile.trees[side].width,
            )
            for side in SIDES
        ]
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
