"""Layout: fibre orders, then tensorization, then an order of the modes."""

from __future__ import annotations

from functools import lru_cache
from math import prod
from typing import Self

from pydantic import model_validator
from torch import Tensor

from tensornet_compress.errors import TensorNetError
from tensornet_compress.frozen import Frozen
from tensornet_compress.tensor.ordering import FibreOrder
from tensornet_compress.tensor.tensorization import Tensorization


class Layout(Frozen):
    """A reversible map from a tensor of ``shape`` to a tensor of ordered modes.

    Position ``p`` of the laid-out tensor shows mode ``mode_order[p]`` of the tensorization; topologies speak of positions.

    >>> import torch
    >>> import tensornet_compress as tnc
    >>> layout = tnc.Layout.of(((2, 3), (5,)), mode_order=(2, 0, 1))
    >>> layout.shape, layout.dims
    ((6, 5), (5, 2, 3))
    >>> matrix = torch.rand(6, 5)
    >>> torch.equal(layout.invert(layout.apply(matrix)), matrix)
    True
    """

    tensorization: Tensorization
    mode_order: tuple[int, ...]
    fibre_orders: tuple[FibreOrder, ...] = ()

    @model_validator(mode="after")
    def _check(self) -> Self:
        if sorted(self.mode_order) != list(range(len(self.tensorization.modes))):
            raise ValueError(f"{self.mode_order} is not an order of {len(self.tensorization.modes)} modes")
        axes = [order.axis for order in self.fibre_orders]
        if len(set(axes)) != len(axes):
            raise ValueError(f"more than one fibre order for an axis: {axes}; compose them with FibreOrder.then")
        for order in self.fibre_orders:
            if not 0 <= order.axis < len(self.shape) or len(order.permutation) not in (0, self.shape[order.axis]):
                raise ValueError(
                    f"a fibre order of {len(order.permutation)} items on axis {order.axis} does not fit shape {self.shape}"
                )
        return self

    @classmethod
    def native(cls, shape: tuple[int, ...]) -> Layout:
        """The tensor as it is."""
        return _native(tuple(shape))

    @classmethod
    def of(
        cls,
        radices: tuple[tuple[int, ...], ...],
        shape: tuple[int, ...] | None = None,
        mode_order: tuple[int, ...] | None = None,
        fibre_orders: tuple[FibreOrder, ...] = (),
    ) -> Layout:
        """A layout from radices per axis; ``shape`` defaults to their products, ``mode_order`` to the native one."""
        tensorization = Tensorization(shape=tuple(shape or (prod(digits) for digits in radices)), radices=radices)
        order = mode_order if mode_order is not None else tuple(range(len(tensorization.modes)))
        return cls(tensorization=tensorization, mode_order=order, fibre_orders=fibre_orders)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the tensor that is laid out."""
        return self.tensorization.shape

    @property
    def dims(self) -> tuple[int, ...]:
        """Shape of the laid-out tensor: mode sizes in mode order."""
        return _ordered(self.tensorization.modes, self.mode_order)

    @property
    def position_axes(self) -> tuple[int, ...]:
        """For each position, the axis of the tensor whose digit it shows."""
        return _ordered(self.tensorization.mode_axes, self.mode_order)

    @property
    def is_native(self) -> bool:
        """True when the laid-out tensor is the tensor itself."""
        return self.dims == self.shape and not self.fibre_orders and self.mode_order == tuple(range(len(self.shape)))

    @property
    def order_nbytes(self) -> int:
        """Stored bytes of the fibre orders (the mode order is a few characters of the spec)."""
        return sum(order.nbytes for order in self.fibre_orders)

    def axis_positions(self, axis: int) -> tuple[int, ...]:
        """Positions of the digits of ``axis``, most significant first."""
        modes = [mode for mode, owner in enumerate(self.tensorization.mode_axes) if owner == axis]
        return tuple(self.mode_order.index(mode) for mode in modes)

    def fibre_order(self, axis: int) -> FibreOrder | None:
        """The fibre order of ``axis``, if it has one."""
        return next((order for order in self.fibre_orders if order.axis == axis), None)

    def apply(self, tensor: Tensor) -> Tensor:
        """A tensor of ``shape`` -> its ordered modes of shape ``dims``."""
        if tuple(tensor.shape) != self.shape:
            raise TensorNetError(f"a layout of shape {self.shape} was given a tensor of shape {tuple(tensor.shape)}")
        for order in self.fibre_orders:
            tensor = order.apply(tensor)
        return self.tensorization.apply(tensor).permute(self.mode_order)

    def invert(self, laid_out: Tensor) -> Tensor:
        """Ordered modes -> the tensor of ``shape``."""
        if tuple(laid_out.shape) != self.dims:
            raise TensorNetError(f"expected a laid-out tensor of shape {self.dims}, was given {tuple(laid_out.shape)}")
        inverse = sorted(range(len(self.mode_order)), key=self.mode_order.__getitem__)
        tensor = self.tensorization.invert(laid_out.permute(inverse))
        for order in reversed(self.fibre_orders):
            tensor = order.invert(tensor)
        return tensor


@lru_cache(maxsize=256)
def _native(shape: tuple[int, ...]) -> Layout:
    return Layout.of(tuple((size,) for size in shape), shape=shape)


@lru_cache(maxsize=4096)
def _ordered(of_modes: tuple[int, ...], mode_order: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(of_modes[mode] for mode in mode_order)
