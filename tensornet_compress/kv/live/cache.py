"""Live mode: every layer by itself, packed codes that attention contracts against at every step."""

from __future__ import annotations

import weakref
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tensornet_compress.coding.planes import UNIT
from tensornet_compress.errors import TensorNetError
from tensornet_compress.kv.cache import CacheReport, CompressedCache
from tensornet_compress.kv.live.attention import NAME
from tensornet_compress.kv.live.codec import Curve, LiveBasis, SideCode, allocate
from tensornet_compress.kv.live.layer import LiveLayer
from tensornet_compress.kv.profile.profile import SIDES, Profile
from tensornet_compress.kv.profile.tree import StoredBasis
from tensornet_compress.kv.rope import text_config
from tensornet_compress.kv.storage.sequence_codec import own_basis

_CONTRACTED_QUERIES = 16
_OWN = ("fine", "codes", "scale", "deviation", "mean", "error", "step")


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
        self._config = weakref.ref(text_config(model))
        self._codes: list[tuple[SideCode, SideCode]] | None = None
        self._own: dict[int, tuple[SideCode, SideCode]] = {}
        self._own_source: dict[int, tuple[tuple[LiveBasis, Curve], ...]] = {}
        super().__init__(model, bits, profile, mode, sinks=sinks, window=window, block=block)
        if profile is not None:
            self._codes = profile.live_codes(bits)

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
            old = [states[:, :, : states.shape[2] - self.window].cpu() for states in (layer.keys, layer.values)]
            sources = tuple(map(own_basis, old))
            self._learn(place, sources, layer.keys.shape[1])
        return self._own[place]

    def _learn(self, place: int, sources: tuple[tuple[LiveBasis, Curve], ...], heads: int) -> None:
        made = [SideCode(basis, allocate(basis.deviation, curve, self.bits), curve, heads) for basis, curve in sources]
        self._own[place], self._own_source[place] = (made[0], made[1]), sources

    def own_tensors(self) -> dict[str, Tensor]:
        """Bases made from the sequence itself, by flat name: what has to be kept with its codes."""
        found: dict[str, Tensor] = {}
        for place, sources in self._own_source.items():
            for side, (basis, curve) in zip(SIDES, sources):
                name = f"own{place}.{side}"
                found |= {
                    f"{name}.{part}": torch.stack([block.tensors()[part] for block in basis.blocks])
                    for part in basis.blocks[0].tensors()
                }
                found |= {f"{name}.deviation": basis.deviation, f"{name}.mean": basis.mean}
                found |= {f"{name}.error": curve.error, f"{name}.step": curve.step}
        return found

    def restore_own(self, tensors: dict[str, Tensor]) -> None:
        """The inverse of ``own_tensors``."""
        for place in range(len(self.compressed_layers)):
            if f"own{place}.key.codes" not in tensors:
                continue
            sources = []
            for side in SIDES:
                part = {name: tensors[f"own{place}.{side}.{name}"] for name in _OWN}
                blocks = tuple(StoredBasis(*parts) for parts in zip(part["fine"], part["codes"], part["scale"]))
                sources.append((LiveBasis(blocks, part["deviation"], part["mean"]), Curve(part["error"], part["step"])))
            self._learn(place, tuple(sources), len(tensors[f"own{place}.key.codes"]))

    def reset(self) -> None:
        """Empty the cache; bases made from its sequence go too."""
        super().reset()
        self._own, self._own_source = {}, {}

    def report(self) -> CacheReport:
        """Where the bytes are."""
        layers = self.compressed_layers
        return self.make_report(
            sealed=layers[0].sealed,
            payload=sum(layer.payload_nbytes for layer in layers),
            sinks=sum(layer.sink_nbytes for layer in layers),
            tail=sum(layer.held_bytes for layer in layers),
            working=0,
            shared=sum(code.resident_nbytes for pair in self._codes or [] for code in pair),
            basis=sum(tensor.nbytes for tensor in self.own_tensors().values()),
        )
