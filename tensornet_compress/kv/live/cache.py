"""Live mode: every layer by itself, packed codes that attention contracts with at every step."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from tensornet_compress.coding.fixed_rate import Curve, check_bits
from tensornet_compress.coding.planes import UNIT, WIDTHS, Planes
from tensornet_compress.coding.stored_basis import StoredBasis
from tensornet_compress.errors import CheckpointError, TensorNetError
from tensornet_compress.kv.cache import CompressedCache
from tensornet_compress.kv.files import CacheRecord
from tensornet_compress.kv.live.attention import CodedSide
from tensornet_compress.kv.live.codec import LiveBasis
from tensornet_compress.kv.live.layer import LiveLayer
from tensornet_compress.kv.profile.profile import SIDES, Profile
from tensornet_compress.kv.rope import text_config

_OWN = ("fine", "codes", "scale", "deviation", "mean", "error", "step")


class LiveCache(CompressedCache, mode="live"):
    """Exact sinks and recent tail, packed codes between; nothing decoded is kept.

    ``attention="auto"`` contracts with the codes wherever a model hands what the cache gave it to PyTorch's
    ``scaled_dot_product_attention``, a few new tokens at a time, and rebuilds keys and values layer by layer elsewhere;
    ``"rebuild"`` always rebuilds.
    """

    bits: float

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
        check_bits(bits)
        super().__init__(model, bits, profile, mode, sinks=sinks, window=window, block=block)
        codes = [()] * len(self.indices) if profile is None else profile.live_codes(bits)
        # Compiled attention takes plain tensors only.
        contracts = attention == "auto" and getattr(text_config(model), "_attn_implementation", None) != "flex_attention"
        self.compress_layers(lambda place: LiveLayer(bits, codes[place], window, block, contracts))

    @torch.compiler.disable
    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append to a layer; returns all its keys and values. Positions matter until the first tokens are sealed."""
        if layer_idx == self.indices[0]:
            if self.compressed_layers[-1].sides:
                self.positions = None
            elif self.positions is not None or not self.get_seq_length(layer_idx):
                self.note_positions(key_states)
                for layer in self.compressed_layers:
                    layer.sink_index = torch.tensor(self.first_real())[:, None] + torch.arange(self.sinks)
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def _held(self) -> dict[str, int]:
        layers = self.compressed_layers
        return super()._held() | {
            "sealed_tokens": layers[0].sealed,
            "payload_nbytes": sum(layer.payload_nbytes for layer in layers),
            "sink_nbytes": sum(layer.sink_nbytes for layer in layers),
            "basis_nbytes": sum(tensor.nbytes for tensor in self._own_tensors().values()),
            "shared_nbytes": sum(code.resident_nbytes for layer in layers for code in layer.profiled),
        }

    def _stored(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors, fields = super()._stored()
        tensors |= self._own_tensors()
        for place, layer in enumerate(self.compressed_layers):
            tensors |= {f"tail{place}.keys": layer.keys, f"tail{place}.values": layer.values}
            for name, side in zip(("keys", "values"), layer.sides):
                tensors |= {f"codes{place}.{name}.{width}": part for width, part in side.planes.whole().items()}
                tensors |= {f"sink_{name}{place}": side.sinks, f"sink_index{place}": side.index}
            if not layer.sides and self.positions is None:
                tensors[f"sink_index{place}"] = layer.sink_index
        return tensors, fields | {"sealed": [layer.sealed for layer in self.compressed_layers]}

    def _restore(self, record: CacheRecord, tensors: dict[str, Tensor], model: nn.Module, whole: bool) -> None:
        super()._restore(record, tensors, model, whole)
        if record.sealed[0] % UNIT:
            raise CheckpointError(f"{record.sealed[0]} sealed tokens are no multiple of {UNIT}")
        for place, layer in enumerate(self.compressed_layers):
            if f"own{place}.key.codes" in tensors:
                layer.learn([_own_source(tensors, f"own{place}.{side}") for side in SIDES])
            layer.sink_index, sealed = tensors.get(f"sink_index{place}"), record.sealed[place]
            if sealed and len(layer.codes) != 2:
                raise CheckpointError(f"layer {place} has codes and no basis to decode them with")
            for name, code in zip(("keys", "values"), layer.codes if sealed else ()):
                packed = {width: tensors[f"codes{place}.{name}.{width}"] for width in WIDTHS}
                sinks, index, states = tensors[f"sink_{name}{place}"], tensors[f"sink_index{place}"], getattr(layer, name)
                wanted = {width: (self.batch, code.layout.rows[width], sealed // UNIT, 8 * width) for width in WIDTHS}
                if any(packed[w].shape != wanted[w] or packed[w].dtype != torch.uint8 for w in WIDTHS):
                    raise CheckpointError(f"the codes of layer {place} do not hold {sealed} tokens of this basis")
                if sinks.shape != (self.batch, states.shape[1], index.shape[-1], states.shape[3]) or not (
                    index.shape[:-1] == (self.batch,)
                    and index.dtype == torch.int64
                    and bool(((index >= 0) & (index < sealed)).all())
                ):
                    raise CheckpointError(f"the exact first tokens of layer {place} do not fit its {sealed} sealed tokens")
                planes = Planes.of(packed)
                side = CodedSide(code, planes, sealed, sinks, index)
                layer.sides = (*layer.sides, side)

    @torch.autocast("cpu", enabled=False)
    def _own_tensors(self) -> dict[str, Tensor]:
        """Bases made from the sequence itself, by flat name: what has to be kept with its codes."""
        tensors: dict[str, Tensor] = {}
        for place, layer in enumerate(self.compressed_layers):
            for side, (basis, curve) in zip(SIDES, layer.sources):
                parts = [block.tensors() for block in basis.blocks]
                own = {name: torch.stack([part[name] for part in parts]) for name in parts[0]}
                own |= {"deviation": basis.deviation, "mean": basis.mean, "error": curve.error, "step": curve.step}
                tensors |= {f"own{place}.{side}.{name}": tensor for name, tensor in own.items()}
        return tensors


def _own_source(tensors: dict[str, Tensor], prefix: str) -> tuple[LiveBasis, Curve]:
    fine, codes, scale, deviation, mean, error, step = (tensors[f"{prefix}.{name}"] for name in _OWN)
    blocks = tuple(StoredBasis(*parts) for parts in zip(fine, codes, scale))
    return LiveBasis(blocks, deviation, mean), Curve(error, step)
