"""Live mode: every layer by itself, packed codes that attention contracts against at every step."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tensornet_compress.errors import TensorNetError
from tensornet_compress.kv.attention import NAME
from tensornet_compress.kv.cache import CacheReport, CompressedCache
from tensornet_compress.kv.free import own_basis
from tensornet_compress.kv.live import Curve, SideCode, allocate
from tensornet_compress.kv.livelayer import LiveLayer
from tensornet_compress.kv.planes import UNIT
from tensornet_compress.kv.profile import SIDES, Profile

_CONTRACTED_QUERIES = 16


class LiveCache(CompressedCache):
    """Exact sinks and recent tail, packed codes between; nothing decoded is kept.

    ``attention="auto"`` contracts where the model runs inside ``contracting`` (the context manager ``compressed`` does) and
    rebuilds keys and values layer by layer elsewhere; ``"rebuild"`` always rebuilds.
    """

    def __init__(
        self,
        model: nn.Module,
        bits: float = 2.0,
        profile: Profile | None = None,
        mode: str = "live",
        *,
        sinks: int = 4,
        window: int = 64,
        block: int = UNIT,
        attention: Literal["auto", "rebuild"] = "auto",
    ):
        if block % UNIT:
            raise TensorNetError(f"block of a live cache must be a multiple of {UNIT}, was given {block}")
        if attention not in ("auto", "rebuild"):
            raise TensorNetError(f"attention must be 'auto' or 'rebuild', was given {attention!r}")
        if not 0.05 <= bits <= 8:
            raise TensorNetError(f"asked for {bits} bits per element; live caches take 0.05 to 8")
        self.bits, self.attention = bits, attention
        self._config = weakref.ref(model.config)
        self._codes: list[tuple[SideCode, SideCode]] | None = None
        self._own: dict[int, tuple[SideCode, SideCode]] = {}
        self._own_nbytes = 0
        super().__init__(model, profile=profile, sinks=sinks, window=window, block=block)
        if profile is not None:
            self._codes = list(_allocated(profile, bits))

    def make_layer(self, index: int) -> Any:
        """See ``CompressedCache``."""
        return LiveLayer(self, index)

    def before_update(self, layer: LiveLayer, key_states: Tensor) -> None:
        """Called by every layer before it appends. Positions only matter until the first tokens are sealed."""
        if layer is self.compressed_layers[0] and not self.compressed_layers[-1].sealed:
            self.note_positions(layer, len(key_states), key_states.shape[2])
        elif layer is self.compressed_layers[0]:
            self.positions = None

    def sink_index(self) -> Tensor:
        """Indices of the sinks, int64 (batch, sinks)."""
        return torch.tensor(self.first_real())[:, None] + torch.arange(self.sinks)

    def contracts(self, layer: LiveLayer, queries: int) -> bool:
        """Whether attention of this forward pass reads packed codes itself."""
        config = self._config()
        inside = config is not None and config._attn_implementation == NAME
        return inside and self.attention == "auto" and queries <= _CONTRACTED_QUERIES

    def codes_of(self, layer: LiveLayer) -> tuple[SideCode, SideCode]:
        """Codes of keys and values of a layer; without a profile they are made from its own first tokens."""
        place = self.compressed_layers.index(layer)
        if self._codes is not None:
            return self._codes[place]
        if place not in self._own:
            made = []
            for states in (layer.keys, layer.values):
                basis, curve = own_basis(states[:, :, : states.shape[2] - self.window])
                made.append(SideCode(basis, allocate(basis.deviation, curve, self.bits), curve, states.shape[1]))
                self._own_nbytes += basis.nbytes + curve.error.nbytes + curve.step.nbytes
            self._own[place] = (made[0], made[1])
        return self._own[place]

    def reset(self) -> None:
        """Empty the cache; bases made from its sequence go too."""
        super().reset()
        self._own, self._own_nbytes = {}, 0

    def report(self) -> CacheReport:
        """Where the bytes are."""
        layers = self.compressed_layers
        return self.make_report(
            sealed=layers[0].sealed,
            payload=sum(layer.payload_nbytes for layer in layers),
            sinks=sum(layer.sink_nbytes for layer in layers),
            tail=sum(layer.held_bytes for layer in layers),
            working=0,
            basis=self._own_nbytes,
        )


def _allocated(profile: Profile, bits: float) -> Iterator[tuple[SideCode, SideCode]]:
    """Codes of every layer, bits shared out over all layers and both sides at once."""
    bases = [pair for pair in zip(*(profile.live[side] for side in SIDES))]
    deviation = torch.cat([basis.deviation for pair in bases for basis in pair])
    chosen = allocate(deviation, profile.curve, bits)
    parts = iter(chosen.split([len(basis.deviation) for pair in bases for basis in pair]))
    for (key, value), heads in zip(bases, profile.spec.heads):
        yield (
            SideCode(key, next(parts), profile.curve, heads),
            SideCode(value, next(parts), profile.curve, heads),
        )
