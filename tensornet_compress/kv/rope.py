"""Rotary positions: taken off keys before coding and put back after.

Rotary embeddings hide the low-rank structure of keys, so calibrated bases live in the space before them. A cache never sees
positions (``update`` receives keys alone), so a recorder listens to the model's rotary module. Which channels are rotated, and
how they are paired, differs between model families; it is measured.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from tensornet_compress.errors import TensorNetError

Style = Literal["half", "interleaved"]
_PROBE_LENGTH = 6
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
        self.close: Callable[[], None] = module.register_forward_pre_hook(_listener(self.seen), with_kwargs=True).remove
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
        if last is None or last.dim() != 2 or last.shape[1] != tokens:
            shape = None if last is None else tuple(last.shape)
            raise TensorNetError(
                f"the cache received {tokens} tokens but its model computed rotary positions of shape {shape}; "
                "use a cache only with the model it was made for, and with one-dimensional positions"
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


def _listener(seen: dict[str, Tensor]) -> Callable[..., None]:
    def listen(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        positions = kwargs.get("position_ids", args[1] if len(args) > 1 else None)
        if isinstance(positions, Tensor):
            seen["positions"] = positions.detach()

    return listen


def text_config(model: nn.Module) -> Any:
    """The configuration of the part of a model that decodes text."""
    config: Any = model.config
    return config.get_text_config(decoder=True)


def rotary_module(model: nn.Module) -> nn.Module | None:
    """The module of ``model`` that turns position ids into (cos, sin), or ``None`` when the model has none."""
    for name, module in model.named_modules():
        if name.rsplit(".", 1)[-1] == "rotary_emb":
            return module
    return None


def rotary_style(model: nn.Module) -> Style | None:
    """How ``model`` pairs rotated channels; ``None``: its keys are not rotated in a known way and are coded as they come.

    Measured once per model: one token repeated gives first-layer keys that differ by their rotation only.
    """
    if model not in _styles:
        _styles[model] = _measure_style(model)
    return _styles[model]


@torch.no_grad()
def _measure_style(model: nn.Module) -> Style | None:
    module = rotary_module(model)
    if module is None:
        return None
    recorder = PositionRecorder(module)
    training = model.training
    try:
        device = next(model.parameters()).device
        cache = DynamicCache()
        model.eval()(torch.ones((1, _PROBE_LENGTH), dtype=torch.int64, device=device), past_key_values=cache, use_cache=True)
        first: Any = cache.layers[0]
        keys = first.keys.float()
        positions = recorder.seen.get("positions")
        if positions is None or positions.dim() != 2:
            return None
        kinds = getattr(text_config(model), "layer_types", None) or ["full_attention"]
        # YaRN and longrope scale cos and sin; a uniform scale does not change which pairing aligns the keys.
        limit = 50 * torch.finfo(first.keys.dtype).eps * keys.abs().max()
        for style in ("half", "interleaved"):
            rotary = recorder.rotary(style, kinds[0])
            if rotary.channels <= keys.shape[-1]:
                plain = rotary.unrotate(keys, positions)
                if (plain - plain[..., :1, :]).abs().max() <= limit:
                    return style
    finally:
        model.train(training)
        recorder.close()
    return None
