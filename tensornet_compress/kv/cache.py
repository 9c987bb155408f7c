"""``CompressedCache``: what both modes of the drop-in cache share, and the choice between them."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING, Cache, DynamicCache, DynamicLayer

from tensornet_compress.errors import TensorNetError
from tensornet_compress.kv.profile.profile import Profile
from tensornet_compress.kv.rope import PositionRecorder, rotary_module, rotary_style, text_config


@dataclass(frozen=True)
class CacheReport:
    """Where the bytes of a cache are. ``shared_nbytes``: what a profile holds in memory, once for all caches of a model and
    not in ``nbytes``. ``skipped``: layers that keep their own class, with their type."""

    tokens: int
    sealed_tokens: int
    payload_nbytes: int
    sink_nbytes: int
    tail_nbytes: int
    working_nbytes: int
    basis_nbytes: int
    other_nbytes: int
    exact_nbytes: int
    shared_nbytes: int
    bits_per_element: float
    skipped: tuple[tuple[int, str], ...]

    @property
    def nbytes(self) -> int:
        """Everything held now."""
        stored = self.payload_nbytes + self.sink_nbytes + self.tail_nbytes + self.basis_nbytes
        return stored + self.working_nbytes + self.other_nbytes

    def __str__(self) -> str:
        lines = [
            f"{self.tokens} tokens, {self.sealed_tokens} sealed; {self.nbytes:,} bytes held, exact cache {self.exact_nbytes:,}",
            f"  payload {self.payload_nbytes:,}  sinks {self.sink_nbytes:,}  recent tail {self.tail_nbytes:,}  "
            f"own bases {self.basis_nbytes:,}  decoded working set {self.working_nbytes:,}  other layers {self.other_nbytes:,}",
            f"  {self.bits_per_element:.3f} bits per key/value element stored: codes, own bases, sinks and recent tail, "
            f"without the decoded working set; beside them {self.shared_nbytes:,} bytes in memory of what",
            "  this mode and rate use of the profile, shared by all caches",
        ]
        lines += [f"  layer {index} keeps its own class: {kind}" for index, kind in self.skipped]
        return "\n".join(lines)


class CompressedCache(Cache):
    """A drop-in ``transformers`` cache that holds compressed networks instead of keys and values.

    ``CompressedCache(model, bits=2.0, profile=None, mode="live", sinks=4, window=64, block=...)`` makes a ``LiveCache`` or,
    with ``mode="storage"``, a ``StorageCache``. Full-attention layers are compressed; others keep their own class and are
    reported.

    Args:
        bits: target payload bits per key/value element; sinks and window come on top.
        profile: from ``calibrate``; without one the bases are made from the sequence itself and count as its bytes.
        sinks, window: first and most recent tokens that stay exact. block: tokens sealed at a time.
    """

    def __new__(
        cls,
        model: nn.Module,
        bits: float = 2.0,
        profile: Profile | None = None,
        mode: Literal["live", "storage"] = "live",
        **kwargs: Any,
    ) -> CompressedCache:
        """Pick the class of the mode."""
        if cls is CompressedCache:
            from tensornet_compress.kv.live.cache import LiveCache
            from tensornet_compress.kv.storage.cache import StorageCache

            if mode not in ("live", "storage"):
                raise TensorNetError(f"mode must be 'live' or 'storage', was given {mode!r}")
            return object.__new__(LiveCache if mode == "live" else StorageCache)
        return object.__new__(cls)

    def __init__(
        self,
        model: nn.Module,
        bits: float = 2.0,
        profile: Profile | None = None,
        mode: str = "live",
        *,
        sinks: int = 4,
        window: int = 64,
        block: int = 64,
    ):
        for name, value, least in (("sinks", sinks, 0), ("window", window, 0), ("block", block, 1)):
            if value < least:
                raise TensorNetError(f"{name} must be at least {least}, was given {value}")
        self.profile, self.sinks, self.window, self.block = profile, sinks, window, block
        self.positions: Tensor | None = None
        self.batch = 0
        self.style = rotary_style(model)
        module = rotary_module(model)
        self.recorder = PositionRecorder(module) if module is not None else None
        if self.recorder is not None:
            weakref.finalize(self, self.recorder.close)
        super().__init__(layers=self._build_layers(model))
        if profile is not None and profile.spec.layers != [layer.index for layer in self.compressed_layers]:
            raise TensorNetError(
                f"the profile was made for full-attention layers {profile.spec.layers}, "
                f"this model has {[layer.index for layer in self.compressed_layers]}"
            )

    def _build_layers(self, model: nn.Module) -> list[Any]:
        layers: list[Any] = []
        # The stock cache knows which class each layer of this model needs, shared and linear layers included.
        for index, layer in enumerate(DynamicCache(config=text_config(model)).layers):
            plain = type(layer) is DYNAMIC_LAYER_TYPE_MAPPING["full_attention"]
            layers.append(self.make_layer(index) if plain else layer)
        self.compressed_layers: list[Any] = [layer for layer in layers if getattr(layer, "owner", None) is self]
        if not self.compressed_layers:
            raise TensorNetError(
                "the model has no full-attention layer that caches keys and values; there is nothing to compress"
            )
        return layers

    def make_layer(self, index: int) -> Any:
        """A compressed layer, with attributes ``owner`` and ``index``."""
        raise NotImplementedError

    def note_positions(self, layer: DynamicLayer, batch: int, tokens: int) -> None:
        """Called by the first compressed layer of a forward pass: remember the positions of the new tokens."""
        total = layer.get_seq_length()
        if self.recorder is not None:
            new = self.recorder.positions(tokens).expand(batch, -1).cpu()
        else:
            new = torch.arange(total, total + tokens).expand(batch, -1)
        if total and self.batch != batch:
            raise TensorNetError(f"the cache holds {self.batch} sequences and was given {batch}; reset it first")
        self.batch = batch
        self.positions = new.clone() if self.positions is None else torch.cat([self.positions, new], 1)

    def first_real(self) -> list[int]:
        """Index of the first unpadded token of each row, among the tokens whose positions are known."""
        if self.positions is None:
            return []
        return [_first_real(row) for row in self.positions]

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last ``-tokens_to_remove`` tokens, also when that reaches into sealed ones."""
        super().crop(tokens_to_remove)
        if self.positions is not None and tokens_to_remove:
            self.positions = self.positions[:, : max(0, self.positions.shape[1] - abs(tokens_to_remove))]

    def reorder_cache(self, beam_idx: Any) -> None:
        """Rows in the order of ``beam_idx`` (rows,)."""
        super().reorder_cache(beam_idx)
        self.pick_rows(beam_idx.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row ``repeats`` times."""
        super().batch_repeat_interleave(repeats)
        self.pick_rows([row for row in range(self.batch) for _ in range(repeats)])

    def batch_select_indices(self, indices: Tensor) -> None:
        """Only the rows ``indices`` (integers or a mask)."""
        super().batch_select_indices(indices)
        chosen = torch.as_tensor(indices).cpu()
        self.pick_rows((torch.nonzero(chosen).flatten() if chosen.dtype == torch.bool else chosen).tolist())

    def pick_rows(self, rows: list[int]) -> None:
        """Follow a change of the batch in what is kept beside the layers."""
        if self.positions is not None:
            self.positions = self.positions[rows]
        self.batch = len(rows)

    def reset(self) -> None:
        """Empty the cache."""
        super().reset()
        self.positions, self.batch = None, 0

    @property
    def payload_nbytes(self) -> int:
        """Bytes of the sealed tokens' codes."""
        return self.report().payload_nbytes

    @property
    def nbytes(self) -> int:
        """Bytes of everything held now, decoded working set and layers of other classes included."""
        return self.report().nbytes

    @property
    def bits_per_element(self) -> float:
        """Stored bits per key/value element of the compressed layers: codes, own bases, sinks and tail (no working set)."""
        return self.report().bits_per_element

    def save(self, path: str | Path) -> int:
        """Write to one file; returns its bytes. See ``persist.save_cache``."""
        from tensornet_compress.kv.files import save_cache

        return save_cache(self, path)

    @staticmethod
    def load(path: str | Path, model: nn.Module, profile: Profile | None = None) -> CompressedCache:
        """Read a file written by ``save``. See ``persist.load_cache``."""
        from tensornet_compress.kv.files import load_cache

        return load_cache(path, model, profile)

    def report(self) -> CacheReport:
        """Where the bytes are."""
        raise NotImplementedError

    def make_report(
        self, *, sealed: int, payload: int, sinks: int, tail: int, working: int, basis: int, shared: int
    ) -> CacheReport:
        """Fill in what does not depend on the mode."""
        layers = self.compressed_layers
        tokens = layers[0].get_seq_length()
        elements = tokens * sum(_elements_per_token(layer) for layer in layers)
        itemsize = next((layer.keys.element_size() for layer in layers if layer.is_initialized), 0)
        others = [(i, layer) for i, layer in enumerate(self.layers) if getattr(layer, "owner", None) is not self]
        other = sum(_plain_bytes(layer) for _, layer in others)
        tail += 0 if self.positions is None else self.positions.nbytes
        return CacheReport(
            tokens=tokens,
            sealed_tokens=sealed,
            payload_nbytes=payload,
            sink_nbytes=sinks,
            tail_nbytes=tail,
            working_nbytes=working,
            basis_nbytes=basis,
            other_nbytes=other,
            shared_nbytes=shared,
            exact_nbytes=elements * itemsize + other,
            bits_per_element=8 * (payload + sinks + tail + basis) / elements if elements else 0.0,
            skipped=tuple((i, type(layer).__name__) for i, layer in others),
        )


def _first_real(positions: Tensor) -> int:
    """Padding repeats a position, real tokens count up from zero."""
    zeros = torch.nonzero(positions == 0).flatten()
    return int(zeros[-1]) if len(zeros) else 0


def _elements_per_token(layer: Any) -> int:
    if not layer.is_initialized:
        return 0
    batch, heads, _, width = layer.keys.shape
    return batch * heads * (width + layer.values.shape[-1])


def _plain_bytes(layer: Any) -> int:
    names = ("keys", "values")
    return sum(t.nbytes for t in (getattr(layer, name, None) for name in names) if isinstance(t, Tensor))
