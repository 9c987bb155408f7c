"""What a cache method is given, and what it does with keys and values."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tensornet_compress.bench.peer_packages import fullest
from tensornet_compress.bench.registry import Method, Registry
from tensornet_compress.errors import TensorNetError
from tensornet_compress.kv.profile.calibrate import calibrate
from tensornet_compress.kv.profile.capture import Runner, windows
from tensornet_compress.kv.profile.moments import SideMoments, side_rows
from tensornet_compress.kv.profile.profile import SIDES, Profile
from tensornet_compress.kv.rope import Rotary

States = list[Tensor]
STEP = 0.5
"""Peers whose rates come in steps may take up to this many bits per element more than asked; ours never."""


@dataclass(frozen=True)
class CacheCoder:
    """A cache method at one rate. ``recode``: plain keys and values per layer (heads, tokens, width) and positions (tokens,) ->
    decoded keys and values, and bits per element. ``profile_nbytes``: what calibration learned; ``layer_bits``: bits of keys
    and values by layer."""

    form: str
    recode: Callable[[States, States, Tensor], tuple[States, States, float]]
    profile_nbytes: int = 0
    layer_bits: Sequence[tuple[float, float]] = ()


@dataclass
class CacheCase:
    """A model with calibration text. ``profile_folder``: where our profile is kept or taken from; ``sensitivity_windows`` and
    ``draws`` as in ``kv.calibrate``."""

    model: Any
    calibration: Tensor
    sinks: int = 4
    sensitivity_windows: int = 32
    draws: int = 2
    profile_folder: Path | None = None
    memo: dict[Any, Any] = field(default_factory=dict)

    @cached_property
    def rotary(self) -> Rotary:
        """The model's rotation; the peers that round rotated keys need it.

        Raises:
            TensorNetError: the model has none.
        """
        with Runner(self.model) as runner:
            rotary = runner.rotary()
        if rotary is None:
            raise TensorNetError(f"{type(self.model).__name__} has no rotary positions; the cache benchmark needs them")
        return rotary

    @cached_property
    def profile(self) -> Profile:
        """Our calibrated profile."""
        folder = self.profile_folder
        if folder is not None and (folder / "profile.json").exists():
            return Profile.load(folder)
        made = calibrate(self.model, self.calibration.split(1), sensitivity_windows=self.sensitivity_windows, draws=self.draws)
        if folder is not None:
            made.save(folder)
        return made

    @property
    def width(self) -> int:
        """Channels of a head."""
        return self.profile.spec.key.width

    @property
    def heads(self) -> Sequence[int]:
        """Key-value heads of each layer."""
        return self.profile.spec.heads

    @property
    def channels(self) -> int:
        """Channels of one side of all layers."""
        return self.width * sum(self.heads)

    @cached_property
    def calibration_rows(self) -> dict[str, Tensor] | None:
        """Plain keys and values, a row for each token (tokens, channels), where they are fewer than channels; else ``None``."""
        if self.calibration.numel() >= self.channels:
            return None
        return {side: torch.cat([rows[side] for rows in self._rows()]) for side in SIDES}

    @cached_property
    def calibration_moments(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Mean and covariance of plain keys and values over all layers, from the windows of our profile."""
        moments = {side: SideMoments(self.channels) for side in SIDES}
        known = self.calibration_rows
        for rows in self._rows() if known is None else [known]:
            for side in SIDES:
                moments[side].add(rows[side])
        return {side: (streamed.mean(), streamed.covariance()) for side, streamed in moments.items()}

    def _rows(self) -> Iterator[dict[str, Tensor]]:
        with Runner(self.model) as runner:
            for window in windows(self.calibration.split(1)):
                for captured in runner.capture(window):
                    yield side_rows(captured, self.sinks)

    def rounded(
        self, form: str, bits: float, key: Callable[[Tensor], Tensor], value: Callable[[Tensor], Tensor] | None = None
    ) -> CacheCoder:
        """A coder that rounds layer by layer, keys with their rotary positions on: ``key`` and ``value`` are states
        (heads, tokens, width) -> decoded ones, the same function for both by default."""
        rotary = self.rotary

        def recode(keys: States, values: States, positions: Tensor) -> tuple[States, States, float]:
            turned = [rotary.unrotate(key(rotary.rotate(states, positions)), positions) for states in keys]
            return turned, [(value or key)(states) for states in values], bits

        return CacheCoder(form, recode)


CACHE_METHODS: Registry[Method[CacheCase, CacheCoder]] = Registry("cache method")


def nominal(bits: float, grids: Sequence[tuple[int, int]], cost: Callable[[int, int], float]) -> tuple[int, int]:
    """The fullest (bits of a code, group) among ``grids`` that takes at most ``STEP`` more than asked, see ``fullest``."""
    return fullest(grids, cost, bits + STEP, "element", bits)
