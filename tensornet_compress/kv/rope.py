"""Rotary positions: taken off keys before coding and put back after.

Rotary embeddings hide the low-rank structure of keys, so calibrated bases live in the space before them. A cache never sees
positions (``update`` receives keys alone), so a recorder listens to the model's rotary module. Which channels are rotated, and
how they are paired, differs between model families; it is measured.
"""

from __future__ import annotations

import weakref
from functools import partial
from typing import Any, Literal, get_args
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer

from tensornet_compress.calibrate.hooks import evaluating
from tensornet_compress.errors import TensorNetError

Style = Literal["half", "interleaved"]
STYLES: tuple[Style, ...] = get_args(Style)
_PROBE_LENGTH = 6
_LEFT = 0.2
"""Share of a movement that rounding may leave when the right pairing undoes it; a wrong one leaves about all."""
Shapes = dict[int, tuple[tuple[int, int], tuple[int, int]]]
_shapes: WeakKeyDictionary[nn.Module, Shapes] = WeakKeyDictionary()
_styles: WeakKeyDictionary[nn.Module, Style | None] = WeakKeyDictionary()


class Rotary:
    """One rotation: angles per position, the first ``channels`` channels of a head, and how they pair up."""

    def __init__(self, frequencies: Tensor, style: Style):
        """``frequencies``: radians per position, fp32 (channels / 2,)."""
        self.frequencies, self.style = frequencies.float(), style

    @property
    def channels(self) -> int:
        """Number of rotated channels; the rest of a head passes through."""
        return 2 * self.frequencies.numel()

    def rotate(self, states: Tensor, positions: Tensor) -> Tensor:
        """Turn states (..., tokens, channel) by ``positions`` (broadcastable to (..., tokens)); same shape and dtype."""
        return self._turn(states, positions, 1.0)

    def unrotate(self, states: Tensor, positions: Tensor) -> Tensor:
        """The inverse of ``rotate``; exact, because a rotation is orthogonal."""
        return self._turn(states, positions, -1.0)

    def average(self, matrices: Tensor, positions: Tensor) -> Tensor:
        """Mean of ``R M R'`` over the rotations R at ``positions`` (count,), for fp64 matrices (..., width, width)."""
        width = matrices.shape[-1]
        total = torch.zeros_like(matrices)
        for turn in self.rotate(torch.eye(width).expand(len(positions), -1, -1), positions[:, None]).mT.double():
            total += turn @ matrices @ turn.T
        return total / len(positions)

    def same_as(self, other: Rotary) -> bool:
        """Whether both turn alike (dynamic rope types change their frequencies with length)."""
        return self.style == other.style and torch.equal(self.frequencies, other.frequencies)

    def _turn(self, states: Tensor, positions: Tensor, sign: float) -> Tensor:
        angle = positions.to(torch.float32)[..., None] * self.frequencies.to(states.device)
        cos, sin = angle.cos(), angle.sin() * sign
        turned, rest = states[..., : self.channels].float(), states[..., self.channels :]
        if self.style == "half":
            first, second = turned.chunk(2, dim=-1)
            turned = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
        else:
            first, second = turned[..., 0::2], turned[..., 1::2]
            turned = torch.stack([first * cos - second * sin, second * cos + first * sin], dim=-1).flatten(-2)
        return torch.cat([turned.to(states.dtype), rest], dim=-1)


class PositionRecorder:
    """Listens to a rotary module and keeps the last position ids it was given, int64 (batch or 1, tokens).

    The listener is taken off by ``close``, and when the recorder is no longer used. A copy listens to the same module.
    """

    def __init__(self, module: nn.Module):
        self.module = module
        self.seen: dict[str, Tensor] = {}
        self.close = module.register_forward_pre_hook(partial(_listen, self.seen), with_kwargs=True).remove
        weakref.finalize(self, self.close)

    def __deepcopy__(self, memo: dict[int, Any]) -> PositionRecorder:
        copied = PositionRecorder(self.module)
        copied.seen.update(self.seen)
        return copied

    def positions(self, tokens: int) -> Tensor:
        """Position ids of the ``tokens`` tokens of the current forward pass, (batch or 1, tokens).

        Raises:
            TensorNetError: the model did not compute positions of that many tokens; the cache belongs to another model.
        """
        last = self.seen.get("positions")
        if last is not None and last.dim() == 3:
            # Of time, height and width (Qwen2-VL): keys of such models are never turned back, so the first tells enough.
            last = last[0]
        if last is None or last.dim() != 2 or last.shape[1] != tokens:
            shape = None if last is None else tuple(last.shape)
            raise TensorNetError(
                f"the cache received {tokens} tokens but its model computed rotary positions of shape {shape}; "
                "use a cache only with the model it was made for"
            )
        return last

    def rotary(self, style: Style, layer_type: str = "full_attention") -> Rotary:
        """The rotation that layers of a type use now.

        Raises:
            TensorNetError: the module holds no frequencies.
        """
        for name in (f"{layer_type}_inv_freq", "inv_freq"):
            frequencies = getattr(self.module, name, None)
            if isinstance(frequencies, Tensor):
                return Rotary(frequencies.detach(), style)
        raise TensorNetError(f"the rotary module {type(self.module).__name__} has no inv_freq buffer; it cannot be undone")


def _listen(seen: dict[str, Tensor], _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    positions = kwargs.get("position_ids", args[1] if len(args) > 1 else None)
    if isinstance(positions, Tensor):
        seen["positions"] = positions.detach()


def text_config(model: nn.Module) -> Any:
    """The configuration of the part of a model that decodes text."""
    config: Any = model.config
    return config.get_text_config(decoder=True)


def is_encoder_decoder(model: nn.Module) -> bool:
    """Whether the decoder of ``model`` also caches keys and values of an encoder."""
    config: Any = model.config
    return bool(getattr(config, "is_encoder_decoder", False))


def rotary_module(model: nn.Module) -> nn.Module | None:
    """The module that turns position ids into (cos, sin) where ``model`` decodes text, or ``None`` when there is none."""
    find = getattr(model, "get_decoder", None)
    for part in (model if find is None else find(), model):
        for name, module in part.named_modules():
            if name.rsplit(".", 1)[-1] == "rotary_emb":
                return module
    return None


def rotary_style(model: nn.Module) -> Style | None:
    """How ``model`` pairs rotated channels; ``None``: its keys are not rotated in a known way and are coded as they come.

    Measured once per model, at the first layer that caches keys: nothing before it knows of positions, so the keys of a text
    that is moved by some positions differ by a rotation only.
    """
    if model not in _styles:
        _styles[model] = _measure_style(model)
    return _styles[model]


def _holds_tokens(layer: Any, ids: Tensor) -> bool:
    """Whether a layer of a cache holds keys of these tokens, and not of an image or nothing yet."""
    keys = layer.keys if isinstance(layer, DynamicLayer) else None
    return keys is not None and keys.shape[-2] == ids.shape[1]


@torch.no_grad()
def _measure_style(model: nn.Module) -> Style | None:
    module, config = rotary_module(model), text_config(model)
    if module is None or is_encoder_decoder(model):
        return None
    recorder, device = PositionRecorder(module), next(model.parameters()).device
    moved: list[tuple[int, Any]] = []
    try:
        with evaluating(model):
            for start in (0, _PROBE_LENGTH):
                ids = torch.ones((1, _PROBE_LENGTH), dtype=torch.int64, device=device)
                positions = torch.arange(start, start + _PROBE_LENGTH, device=device)[None]
                cache = DynamicCache(config=config)
                try:
                    model(input_ids=ids, position_ids=positions, past_key_values=cache, use_cache=True)
                except Exception as error:  # whatever a model's own code raises when it is given a cache of the usual kind
                    raise TensorNetError(
                        f"{type(model).__name__} does not work with a cache that is passed to it ({error}); keep its own"
                    ) from error
                if not torch.equal(recorder.seen.get("positions", ids), positions):
                    return None
                layers: list[Any] = list(cache.layers)
                moved.append(next((i, layer.keys) for i, layer in enumerate(layers) if _holds_tokens(layer, ids)))
        (index, keys), (_, later) = moved
        kind = (getattr(config, "layer_types", None) or {index: "full_attention"})[index]
        # YaRN and longrope scale cos and sin; a uniform scale does not change which pairing aligns the keys.
        moves = float((keys.float() - later.float()).norm())
        for style in STYLES:
            rotary = recorder.rotary(style, kind)
            turned = rotary.rotate(keys.float(), torch.tensor([_PROBE_LENGTH], device=device))
            if rotary.channels <= keys.shape[-1] and float((turned - later.float()).norm()) < _LEFT * moves:
                return style
    finally:
        recorder.close()
    return None


@torch.no_grad()
def state_shapes(model: nn.Module) -> Shapes:
    """By layer, (heads, width) of the keys and of the values that ``model`` caches, seen once on one token; empty for decoders
    that need an encoder."""
    if is_encoder_decoder(model):
        return {}
    if model not in _shapes:
        cache = DynamicCache(config=text_config(model))
        with evaluating(model):
            ids = torch.ones((1, 1), dtype=torch.int64, device=next(model.parameters()).device)
            model(input_ids=ids, past_key_values=cache, use_cache=True)
        held: Any = ((i, layer) for i, layer in enumerate(cache.layers) if isinstance(layer, DynamicLayer))
        states = {i: (layer.keys, layer.values) for i, layer in held if layer.is_initialized}
        _shapes[model] = {
            i: ((keys.shape[1], keys.shape[3]), (values.shape[1], values.shape[3])) for i, (keys, values) in states.items()
        }
    return _shapes[model]
