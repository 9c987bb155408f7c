"""``CompressedCache``: the drop-in cache, of which each mode has a kind; what the kinds share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar, Literal
from weakref import ref

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from tensornet_compress.errors import CheckpointError, TensorNetError
from tensornet_compress.kv.files import CacheRecord, read_cache, weights_fingerprint, write_cache
from tensornet_compress.kv.planning import CacheReport
from tensornet_compress.kv.profile.profile import Profile
from tensornet_compress.kv.rope import (
    PositionRecorder,
    is_encoder_decoder,
    rotary_module,
    rotary_style,
    state_shapes,
    text_config,
)

_ALWAYS, _PER_BYTE = 1 << 28, 1 << 14
"""Numbers that a loaded cache may stand for in any case, and for each byte of its exact states."""
_ON_DEVICE = ("tail", "other", "codes", "sink")
"""First letters of the names of stored tensors that lie where the model is; the others stay on the processor."""


class CompressedCache(Cache):
    """A drop-in ``transformers`` cache that holds compressed networks instead of keys and values.

    ``mode="live"`` makes a ``LiveCache``, ``mode="storage"`` a ``StorageCache``. Full-attention layers are compressed; others
    keep their own class and are reported.

    Args:
        bits: target payload bits per key/value element; sinks and window come on top.
        profile: from ``calibrate``; without one the bases are made from the sequence itself and count as its bytes.
        sinks, window: first and most recent tokens that stay exact. block: tokens sealed at a time.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> sizes = dict(vocab_size=50, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4)
    >>> model = LlamaForCausalLM(LlamaConfig(**sizes)).eval()
    >>> cache = CompressedCache(model, bits=3.0, mode="storage")
    >>> logits = model(torch.ones(1, 300, dtype=torch.int64), past_key_values=cache).logits
    >>> cache.get_seq_length(), cache.report().sealed_tokens
    (300, 128)
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
        """Of the kind that the mode has. (``copy`` calls this for a kind, without arguments.)"""
        if cls is not CompressedCache:
            return object.__new__(cls)
        if mode not in cls.kinds:
            raise TensorNetError(f"mode must be 'live' or 'storage', was given {mode!r}")
        return object.__new__(cls.kinds[mode])

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
        **options: Any,
    ):
        _check_profile(profile)
        for name, value, least in (("sinks", sinks, 0), ("window", window, 0), ("block", block, 1)):
            if value < least:
                raise TensorNetError(f"{name} must be at least {least}, was given {value}")
        self.bits, self.profile, self.sinks, self.window, self.block = bits, profile, sinks, window, block
        self.positions: Tensor | None = None
        self.batch = 0
        self._model = ref(model)
        self.style = rotary_style(model)
        module = rotary_module(model)
        self.recorder = PositionRecorder(module) if module is not None else None
        # The stock cache knows which class each layer of this model needs, shared and linear layers included.
        super().__init__(layers=list(DynamicCache(config=text_config(model)).layers))
        # What a layer caches of an image or of an encoder is no sequence of tokens.
        crossing = set(getattr(text_config(model), "cross_attention_layers", None) or ())
        plain = [index for index, layer in enumerate(self.layers) if type(layer) is DynamicLayer]
        self.indices = [index for index in plain if index not in crossing]
        if not self.indices:
            mixed = sorted({type(layer).__name__ for layer in self.layers if "FullAttention" in type(layer).__name__})
            raise TensorNetError(
                f"layers of {', '.join(mixed)} keep other states beside keys and values; they are not compressed"
                if mixed
                else "the model has no full-attention layer that caches keys and values; there is nothing to compress"
            )
        if profile is not None and profile.spec.layers != self.indices:
            raise TensorNetError(
                f"the profile was made for full-attention layers {profile.spec.layers}, this model has {self.indices}"
            )
        self.compressed_layers: list[Any] = []
        self.paired = is_encoder_decoder(model)
        self._latest: int | None = None
        if self.paired and len(self.layers) == 1:
            raise TensorNetError("an encoder-decoder with one decoder layer could misuse it unseen; keep an exact cache")

    def compress_layers(self, make: Callable[[int], DynamicLayer]) -> None:
        """Put a layer of its kind, made from its place among these, where each full-attention layer is."""
        for place, index in enumerate(self.indices):
            self.layers[index] = make(place)
        self.compressed_layers = [self.layers[index] for index in self.indices]

    @torch.compiler.disable
    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append keys and values, (batch, heads, new, width), to a layer; returns all that it holds.

        Raises:
            TensorNetError: a decoder also puts here what it caches of its encoder.
        """
        if self.paired and layer_idx == self._latest:
            raise TensorNetError(
                "this decoder caches itself and its encoder in one cache, which mixes them up; pass "
                "past_key_values=EncoderDecoderCache(cache, DynamicCache()), or generate inside kv.compressed(model)"
            )
        self._latest = layer_idx
        self._check_heads(key_states, value_states, layer_idx)
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def _check_heads(self, keys: Tensor, values: Tensor, index: int) -> None:
        """Refuse states of another model than the profile's when they come, not once a block of them is sealed."""
        if self.profile is None or index not in self.indices:
            return
        spec = self.profile.spec
        for name, states, width in (("keys", keys, spec.key.width), ("values", values, spec.value.width)):
            made_for = spec.heads[spec.layers.index(index)], width
            if (found := (states.shape[1], states.shape[3])) != made_for:
                raise TensorNetError(
                    f"layer {index} caches {name} of {found[0]} heads of width {found[1]}, the profile was made for "
                    f"{made_for[0]} of width {made_for[1]}; calibrate this model"
                )

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
        found = []
        for row in () if self.positions is None else self.positions:
            # Padding repeats one position, real tokens count up from zero; positions that start anew later are other texts.
            padding = int((row == row[:1]).long().cumprod(0).sum()) if len(row) else 0
            starts = torch.nonzero(row[: padding + 1] == 0).flatten().tolist()
            found.append(starts[-1] if starts else 0)
        return found

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
        self.positions, self.batch, self._latest = None, 0, None

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

    def _held(self) -> dict[str, int]:
        """Bytes that the compressed layers hold, by their names in a ``CacheReport``."""
        states = [part for layer in self.compressed_layers if layer.is_initialized for part in (layer.keys, layer.values)]
        return {"tail_nbytes": sum(part.nbytes for part in states)}

    def report(self) -> CacheReport:
        """Where the bytes are."""
        layers = [layer for layer in self.compressed_layers if layer.is_initialized]
        tokens = self.compressed_layers[0].get_seq_length()
        shapes = [states.shape for layer in layers for states in (layer.keys, layer.values)]
        elements = tokens * sum(batch * heads * width for batch, heads, _, width in shapes)
        other = sum(part.nbytes for _, layer in self._other_layers() for part in _states_of(layer))
        parts = dict.fromkeys(("sealed_tokens", "working_nbytes", "basis_nbytes"), 0) | self._held()
        parts["tail_nbytes"] += 0 if self.positions is None else self.positions.nbytes
        stored = sum(parts[f"{name}_nbytes"] for name in ("payload", "sink", "tail", "basis"))
        return CacheReport(
            tokens=tokens,
            other_nbytes=other,
            exact_nbytes=elements * (layers[0].keys.element_size() if layers else 0) + other,
            bits_per_element=8 * stored / elements if elements else 0.0,
            skipped=tuple((index, type(layer).__name__) for index, layer in self._other_layers()),
            **parts,
        )

    def _stored(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """For a file: tensors by name, and the fields of the ``CacheRecord`` that a kind fills in."""
        tensors: dict[str, Tensor] = {} if self.positions is None else {"positions": self.positions}
        lengths: dict[int, int | None] = {}
        for index, layer in self._other_layers():
            if not _states_of(layer):
                continue
            if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
                raise TensorNetError(f"layer {index} is a {type(layer).__name__}, whose state cannot be saved yet")
            tensors |= {f"other{index}.keys": layer.keys, f"other{index}.values": layer.values}
            lengths[index] = getattr(layer, "cumulative_length", None)
        return tensors, {"other": lengths}

    def _restore(self, record: CacheRecord, tensors: dict[str, Tensor], model: nn.Module, whole: bool) -> None:
        """The inverse of ``_stored``; ``whole``: hashes say that the tensors are those that were saved."""
        if strange := sorted(index for index in record.other if index in self.indices or index >= len(self.layers)):
            raise CheckpointError(f"it speaks of layers {strange}, which the model does not have so")
        named = [(layer, f"tail{place}") for place, layer in enumerate(self.compressed_layers)]
        others: dict[int, Any] = {index: self.layers[index] for index in record.other}
        for layer, name in named + [(layer, f"other{index}") for index, layer in others.items()]:
            layer.lazy_initialization(tensors[f"{name}.keys"], tensors[f"{name}.values"])
            layer.keys, layer.values = tensors[f"{name}.keys"], tensors[f"{name}.values"]
        for index, length in record.other.items():
            if length is not None:
                others[index].cumulative_length = length
        self.positions, self.batch = tensors.get("positions"), len(tensors["tail0.keys"])
        self._check_states(record, model)

    def _check_states(self, record: CacheRecord, model: nn.Module) -> None:
        """Refuse states that the model could not have put here, and more tokens than are believed."""
        length = self.compressed_layers[0].keys.shape[2]
        shapes = state_shapes(model)
        held: dict[int, Any] = {index: self.layers[index] for index in (*self.indices, *record.other)}
        elements = stored = 0
        for index, layer in held.items():
            for side, states in enumerate((layer.keys, layer.values)):
                batch, heads, tokens, width = states.shape
                wanted = shapes.get(index, ((heads, width),) * 2)[side]
                if (batch, heads, width) != (self.batch, *wanted) or not states.is_floating_point():
                    raise CheckpointError(f"layer {index} has states of shape {tuple(states.shape)}, the model makes {wanted}")
                if index in self.indices and tokens != length:
                    raise CheckpointError(f"layer {index} has {tokens} exact tokens, the first one {length}")
                elements += batch * heads * width * (record.sealed[0] + tokens)
                stored += states.nbytes
        if elements > max(_ALWAYS, _PER_BYTE * stored):
            raise CheckpointError(f"it describes {elements:,} numbers, and has {stored:,} bytes of exact states")
        positions = self.positions
        if positions is not None and (
            positions.dtype != torch.int64
            or positions.shape not in ((self.batch, length), (self.batch, record.sealed[0] + length))
            or bool((positions < 0).any())
        ):
            raise CheckpointError(f"it has positions of shape {tuple(positions.shape)}, and {length} tokens that are not coded")

    def save(self, path: str | Path) -> int:
        """Write the cache to one file, whole or not at all, storage caches frozen; returns the bytes of the file.

        Raises:
            TensorNetError: the cache is empty, has a codec of its own, or holds layers that cannot be saved.
        """
        if not self.compressed_layers[0].is_initialized:
            raise TensorNetError("the cache is empty; there is nothing to save")
        tensors, fields = self._stored()
        fields |= {name: getattr(self, name) for name in ("mode", "bits", "sinks", "window", "block")}
        fields["profile"] = None if self.profile is None else self.profile.fingerprint()
        model = self._model()
        fields["model"] = None if model is None else weights_fingerprint(model)
        return write_cache(path, CacheRecord(**fields), tensors)

    @staticmethod
    def load(path: str | Path, model: nn.Module, profile: Profile | None = None, verify: bool = True) -> CompressedCache:
        """A cache written by ``save``, ready for ``past_key_values`` of the same model, with the profile it was made with.
        ``verify``: check the hashes in the file, and that the model has the weights of the one that filled the cache; older
        files, and those saved after their model was gone, tell nothing of weights.

        Raises:
            CheckpointError: the file is missing, damaged, of another version, or needs another profile or model.
        """
        _check_profile(profile)
        record, tensors, hashed = read_cache(path, None if profile is None else profile.fingerprint(), model, verify)
        options: dict[str, Any] = {"sinks": record.sinks, "window": record.window, "block": record.block}
        cache = CompressedCache(model, record.bits or 2.0, profile, record.mode, **options)
        if len(record.sealed) != len(cache.indices):
            raise CheckpointError(
                f"the cache in {str(path)!r} has {len(record.sealed)} compressed layers, the model {len(cache.indices)}"
            )
        device = next(model.parameters()).device
        tensors = {name: t.to(device) if name.startswith(_ON_DEVICE) else t for name, t in tensors.items()}
        try:
            cache._restore(record, tensors, model, hashed and verify)
        except CheckpointError as error:
            raise CheckpointError(f"the cache in {str(path)!r} is damaged or of another model: {error}") from error
        except (KeyError, IndexError, RuntimeError, ValueError, TypeError) as error:
            raise CheckpointError(f"the cache in {str(path)!r} lacks or misshapes a tensor: {error}") from error
        return cache

    def _other_layers(self) -> Iterator[tuple[int, Any]]:
        return ((index, layer) for index, layer in enumerate(self.layers) if index not in self.indices)


def row_numbers(indices: Tensor) -> Tensor:
    """Rows of a batch, given as integers or as a mask, as integers on the processor."""
    chosen = torch.as_tensor(indices).cpu()
    return torch.nonzero(chosen).flatten() if chosen.dtype == torch.bool else chosen


def _states_of(layer: Any) -> list[Tensor]:
    """The states that a layer of another class holds: keys and values, or those of linear attention."""
    held = [vars(layer).get(name) for name in ("keys", "values", "indexer_keys", "conv_states", "recurrent_states")]
    parts = [part for value in held for part in (value.values() if isinstance(value, dict) else (value,))]
    return [part for part in parts if isinstance(part, Tensor)]


def _check_profile(profile: object) -> None:
    if profile is not None and not isinstance(profile, Profile):
        raise TensorNetError(f"profile must be a kv.Profile, was given {profile!r}; load a folder by kv.Profile.load")
