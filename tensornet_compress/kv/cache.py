"""``CompressedCache``: the drop-in cache, of which each mode has a kind; what the kinds share, and saved caches."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from tensornet_compress.errors import CheckpointError, TensorNetError
from tensornet_compress.kv.files import CacheRecord, read_cache, write_cache
from tensornet_compress.kv.planning import CacheReport
from tensornet_compress.kv.profile.profile import Profile
from tensornet_compress.kv.rope import PositionRecorder, rotary_module, rotary_style, text_config

_ON_DEVICE = ("tail", "other", "codes", "sink")
"""First letters of the names of stored tensors that lie where the model is; the others stay on the processor."""


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

    kinds: ClassVar[dict[str, type[CompressedCache]]] = {}
    mode: ClassVar[Literal["live", "storage"]]
    bits: float | None

    def __init_subclass__(cls, mode: Literal["live", "storage"] | None = None) -> None:
        if mode is not None:
            cls.mode = mode
            CompressedCache.kinds[mode] = cls

    def __new__(
        cls, model: nn.Module | None = None, bits: float = 2.0, profile: Profile | None = None, mode: str = "live", **_: Any
    ) -> CompressedCache:
        """An empty cache of the mode's kind; ``copy`` calls this without arguments, and for a kind."""
        if cls is CompressedCache:
            if mode not in cls.kinds:
                raise TensorNetError(f"mode must be 'live' or 'storage', was given {mode!r}")
            return object.__new__(cls.kinds[mode])
        return object.__new__(cls)

    def __init__(
        self,
        model: nn.Module,
        profile: Profile | None,
        make_layer: Callable[[int], DynamicLayer],
        sinks: int,
        window: int,
        block: int,
    ):
        """``make_layer``: from its place among the compressed layers, a layer to be compressed."""
        for name, value, least in (("sinks", sinks, 0), ("window", window, 0), ("block", block, 1)):
            if value < least:
                raise TensorNetError(f"{name} must be at least {least}, was given {value}")
        self.profile, self.sinks, self.window, self.block = profile, sinks, window, block
        self.positions: Tensor | None = None
        self.batch = 0
        self.style = rotary_style(model)
        module = rotary_module(model)
        self.recorder = PositionRecorder(module) if module is not None else None
        # The stock cache knows which class each layer of this model needs, shared and linear layers included.
        layers: list[Any] = list(DynamicCache(config=text_config(model)).layers)
        self.indices = [index for index, layer in enumerate(layers) if type(layer) is DynamicLayer]
        if not self.indices:
            raise TensorNetError(
                "the model has no full-attention layer that caches keys and values; there is nothing to compress"
            )
        if profile is not None and profile.spec.layers != self.indices:
            raise TensorNetError(
                f"the profile was made for full-attention layers {profile.spec.layers}, this model has {self.indices}"
            )
        self.compressed_layers: list[Any] = [make_layer(place) for place in range(len(self.indices))]
        for index, layer in zip(self.indices, self.compressed_layers):
            layers[index] = layer
        super().__init__(layers=layers)

    def note_positions(self, key_states: Tensor) -> None:
        """Remember the positions of the new tokens of a forward pass, at its first compressed layer."""
        batch, _, tokens, _ = key_states.shape
        total = self.compressed_layers[0].get_seq_length()
        if total and self.batch != batch:
            raise TensorNetError(f"the cache holds {self.batch} sequences and was given {batch}; reset it first")
        if self.recorder is not None:
            new = self.recorder.positions(tokens).expand(batch, -1).cpu()
        else:
            new = torch.arange(total, total + tokens).expand(batch, -1)
        self.batch = batch
        self.positions = new.clone() if self.positions is None else torch.cat([self.positions, new], 1)

    def first_real(self) -> list[int]:
        """Index of the first unpadded token of each row, among the tokens whose positions are known."""
        # Padding repeats a position, real tokens count up from zero.
        starts = [torch.nonzero(row == 0).flatten() for row in (() if self.positions is None else self.positions)]
        return [int(zeros[-1]) if len(zeros) else 0 for zeros in starts]

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
        self.pick_rows(row_numbers(indices).tolist())

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

    @abstractmethod
    def report(self) -> CacheReport:
        """Where the bytes are."""

    @abstractmethod
    def stored(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What the kind holds, for a file: tensors by name, and its own fields of the ``CacheRecord``."""

    @abstractmethod
    def restore(self, record: CacheRecord, tensors: dict[str, Tensor]) -> None:
        """The inverse of ``stored``, after the tails of the layers were put back."""

    def save(self, path: str | Path) -> int:
        """Write the cache to one file, whole or not at all, storage caches frozen; returns the bytes of the file.

        Raises:
            TensorNetError: the cache is empty, has a codec of its own, or holds layers that cannot be saved.
        """
        if not self.compressed_layers[0].is_initialized:
            raise TensorNetError("the cache is empty; there is nothing to save")
        tensors, fields = self.stored()
        fields["other"] = {}
        for index, layer in self._other_layers():
            if not _tensors_of(layer):
                continue
            if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
                raise TensorNetError(f"layer {index} is a {type(layer).__name__}, whose state cannot be saved yet")
            tensors |= {f"other{index}.keys": layer.keys, f"other{index}.values": layer.values}
            fields["other"][index] = getattr(layer, "cumulative_length", None)
        if self.positions is not None:
            tensors["positions"] = self.positions
        shape = {name: getattr(self, name) for name in ("mode", "bits", "sinks", "window", "block")}
        profile = None if self.profile is None else self.profile.fingerprint()
        return write_cache(path, CacheRecord(profile=profile, **shape, **fields), tensors)

    @staticmethod
    def load(path: str | Path, model: nn.Module, profile: Profile | None = None) -> CompressedCache:
        """A cache written by ``save``, ready for ``past_key_values`` of the same model, with the profile it was made with.

        Raises:
            CheckpointError: the file is missing, damaged, of another version, or needs another profile or model.
        """
        record, tensors = read_cache(path, None if profile is None else profile.fingerprint())
        options: dict[str, Any] = {"sinks": record.sinks, "window": record.window, "block": record.block}
        cache = CompressedCache(model, record.bits or 2.0, profile, record.mode, **options)
        if len(record.sealed) != len(cache.compressed_layers):
            raise CheckpointError(
                f"the cache in {str(path)!r} has {len(record.sealed)} compressed layers, "
                f"the model {len(cache.compressed_layers)}"
            )
        device = next(model.parameters()).device
        tensors = {name: t.to(device) if name.startswith(_ON_DEVICE) else t for name, t in tensors.items()}
        try:
            cache._restore_layers(record, tensors)
            cache.restore(record, tensors)
        except (KeyError, IndexError, RuntimeError) as error:
            raise CheckpointError(f"the cache in {str(path)!r} lacks or misshapes a tensor: {error}") from error
        return cache

    def _restore_layers(self, record: CacheRecord, tensors: dict[str, Tensor]) -> None:
        named = [(layer, f"tail{place}") for place, layer in enumerate(self.compressed_layers)]
        named += [(self.layers[index], f"other{index}") for index in record.other]
        for layer, name in named:
            layer.lazy_initialization(tensors[f"{name}.keys"], tensors[f"{name}.values"])
            layer.keys, layer.values = tensors[f"{name}.keys"], tensors[f"{name}.values"]
        for index, length in record.other.items():
            if length is not None:
                self.layers[index].cumulative_length = length  # type: ignore[attr-defined]
        self.positions, self.batch = tensors.get("positions"), len(tensors["tail0.keys"])

    def _other_layers(self) -> Iterator[tuple[int, Any]]:
        return ((index, layer) for index, layer in enumerate(self.layers) if index not in self.indices)

    def make_report(
        self, *, sealed: int, payload: int, sinks: int, tail: int, working: int = 0, basis: int = 0, shared: int
    ) -> CacheReport:
        """Fill in what does not depend on the mode."""
        layers = [layer for layer in self.compressed_layers if layer.is_initialized]
        tokens = self.compressed_layers[0].get_seq_length()
        shapes = [states.shape for layer in layers for states in (layer.keys, layer.values)]
        elements = tokens * sum(batch * heads * width for batch, heads, _, width in shapes)
        other = sum(tensor.nbytes for _, layer in self._other_layers() for tensor in _tensors_of(layer))
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
            exact_nbytes=elements * (layers[0].keys.element_size() if layers else 0) + other,
            bits_per_element=8 * (payload + sinks + tail + basis) / elements if elements else 0.0,
            skipped=tuple((index, type(layer).__name__) for index, layer in self._other_layers()),
        )


def row_numbers(indices: Tensor) -> Tensor:
    """Rows of a batch, given as integers or as a mask, as integers on the processor."""
    chosen = torch.as_tensor(indices).cpu()
    return torch.nonzero(chosen).flatten() if chosen.dtype == torch.bool else chosen


def _tensors_of(layer: Any) -> list[Tensor]:
    """The states that a layer of another class holds: keys and values, or those of linear attention."""
    held = [vars(layer).get(name) for name in ("keys", "values", "indexer_keys", "conv_states", "recurrent_states")]
    parts = [part for value in held for part in (value.values() if isinstance(value, dict) else (value,))]
    return [part for part in parts if isinstance(part, Tensor)]
