"""Tensorization: every axis of a tensor written in a mixed radix, so that one axis becomes several small modes."""

from __future__ import annotations

from functools import lru_cache
from math import prod
from typing import Self

import torch
from pydantic import model_validator
from torch import Tensor

from tensornet_compress.errors import TensorNetError
from tensornet_compress.frozen import Frozen

MOST_MODES = 52
_FREE_PADDING, _MOST_PADDING = 1 << 20, 64
"""Numbers that a padded tensor may have in any case, and for each number of the tensor."""


class Tensorization(Frozen):
    """Axis ``a`` of size ``shape[a]`` is written with digits of base ``radices[a]``, most significant first.

    ``prod(radices[a])`` may exceed ``shape[a]``: the axis is then padded with zeros, which ``invert`` cuts off again.
    The map from entries of the tensor to entries of the padded modes is injective, and a bijective one without padding.
    """

    shape: tuple[int, ...]
    radices: tuple[tuple[int, ...], ...]

    @model_validator(mode="after")
    def _check(self) -> Self:
        if len(self.shape) != len(self.radices):
            raise ValueError(f"{len(self.shape)} axes in shape {self.shape} but {len(self.radices)} lists of radices")
        if len(self.modes) > MOST_MODES:
            raise ValueError(f"{len(self.modes)} modes; at most {MOST_MODES} can be contracted")
        for axis, (size, digits) in enumerate(zip(self.shape, self.radices)):
            if size < 1 or not digits or min(digits) < 1:
                raise ValueError(f"axis {axis} of size {size} with radices {digits}: all must be at least 1")
            if prod(digits) < size:
                raise ValueError(f"axis {axis} of size {size} does not fit radices {digits} (product {prod(digits)})")
        if prod(self.padded_shape) > max(_FREE_PADDING, _MOST_PADDING * prod(self.shape)):
            raise ValueError(f"padding makes {prod(self.padded_shape):,} numbers of {prod(self.shape):,}, more than is of use")
        return self

    @classmethod
    def native(cls, shape: tuple[int, ...]) -> Tensorization:
        """Every axis is one mode."""
        return _native(tuple(shape))

    @property
    def modes(self) -> tuple[int, ...]:
        """Sizes of all modes, axis by axis."""
        return _modes(self.radices)

    @property
    def mode_axes(self) -> tuple[int, ...]:
        """For each mode, the axis of the tensor that it is a digit of."""
        return _mode_axes(self.radices)

    @property
    def padded_shape(self) -> tuple[int, ...]:
        """The shape after zero padding."""
        return tuple(prod(digits) for digits in self.radices)

    @property
    def padding(self) -> int:
        """Number of zero entries that padding adds."""
        return prod(self.padded_shape) - prod(self.shape)

    def apply(self, tensor: Tensor) -> Tensor:
        """A tensor of ``shape`` -> its modes, shape ``modes``."""
        if tuple(tensor.shape) != self.shape:
            raise TensorNetError(f"tensorization of shape {self.shape} was given a tensor of shape {tuple(tensor.shape)}")
        if self.padded_shape != self.shape:
            padded = tensor.new_zeros(self.padded_shape)
            padded[tuple(slice(size) for size in self.shape)] = tensor
            tensor = padded
        return tensor.reshape(self.modes)

    def invert(self, modes: Tensor) -> Tensor:
        """Modes -> the tensor of ``shape``; entries in the padding are dropped."""
        if tuple(modes.shape) != self.modes:
            raise TensorNetError(f"expected modes of shape {self.modes}, was given {tuple(modes.shape)}")
        full = modes.reshape(self.padded_shape)
        return (full[tuple(slice(size) for size in self.shape)] if full.shape != self.shape else full).contiguous()

    def digits(self, axis: int, index: Tensor) -> list[Tensor]:
        """Mixed-radix digits of indices along ``axis``: one tensor like ``index`` per radix."""
        result: list[Tensor] = []
        for radix in reversed(self.radices[axis]):
            result.append(index % radix)
            index = torch.div(index, radix, rounding_mode="floor")
        return result[::-1]


@lru_cache(maxsize=256)
def _native(shape: tuple[int, ...]) -> Tensorization:
    return Tensorization(shape=shape, radices=tuple((size,) for size in shape))


# Plain functions with a memory, as copies of a model with other fields would keep what a cached property remembers.
@lru_cache(maxsize=4096)
def _modes(radices: tuple[tuple[int, ...], ...]) -> tuple[int, ...]:
    return tuple(radix for digits in radices for radix in digits)


@lru_cache(maxsize=4096)
def _mode_axes(radices: tuple[tuple[int, ...], ...]) -> tuple[int, ...]:
    return tuple(axis for axis, digits in enumerate(radices) for _ in digits)
