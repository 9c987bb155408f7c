"""Convolutions in one to three dimensions, plain and transposed, whose kernel is a network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tensornet_compress.errors import TensorNetError
from tensornet_compress.nn.kinds import loaded, turned
from tensornet_compress.nn.module import NetworkModule
from tensornet_compress.tensor import NetworkSpec, TensorNetwork, TermSpec

GEOMETRY = ("stride", "padding", "dilation", "groups", "padding_mode")
_DENSE: dict[tuple[bool, int], type[nn.modules.conv._ConvNd]] = {
    (False, 1): nn.Conv1d, (False, 2): nn.Conv2d, (False, 3): nn.Conv3d,
    (True, 1): nn.ConvTranspose1d, (True, 2): nn.ConvTranspose2d, (True, 3): nn.ConvTranspose3d,
}  # fmt: skip


class TNConv(NetworkModule):
    """A convolution; a network cut as (out)|(in, kernel) runs as a narrow convolution and one of kernel 1. Any other network,
    and that of a transposed convolution, is contracted to its kernel first.

    The axes of the network are outputs (of a group, where the convolution is transposed), inputs (of a group), and the kernel.
    """

    def __init__(
        self,
        spec: NetworkSpec,
        geometry: dict[str, Any],
        stored: dict[str, Tensor] | None = None,
        bias: Tensor | None = None,
    ):
        """``geometry``: stride, padding, dilation, groups and padding_mode as in ``nn.Conv2d``, of a transposed convolution
        also output_padding; what that module tells of itself can be read off this one too."""
        if len(spec.shape) not in (3, 4, 5):
            raise TensorNetError(f"{type(self).__name__} needs a weight (out, in/groups, kernel), the network has {spec.shape}")
        self.axes = self.axes or ("out", "in/groups", *("depth", "height", "width")[5 - len(spec.shape) :])
        super().__init__(spec, stored, bias)
        if set(geometry) - {"output_padding"} != set(GEOMETRY):
            raise TensorNetError(f"a convolution needs {', '.join(GEOMETRY)}, was given {sorted(geometry)}")
        if geometry["padding_mode"] != "zeros":
            raise TensorNetError(f"padding_mode {geometry['padding_mode']!r} is not supported; use 'zeros'")
        dims = len(spec.shape) - 2
        self.transposed, self.output_padding = "output_padding" in geometry, (0,) * dims
        for name, value in geometry.items():
            setattr(self, name, tuple(value) if isinstance(value, list) else value)
        self.kernel_size, groups = spec.shape[2:], geometry["groups"]
        self.out_channels = spec.shape[0] * (groups if self.transposed else 1)
        self.in_channels = spec.shape[1] * (1 if self.transposed else groups)
        self._dense = _DENSE[self.transposed, dims]

    @classmethod
    def from_conv(cls, conv: nn.Module, network: TensorNetwork) -> TNConv:
        """Replace a convolution by a network of its kernel; bias and geometry are kept exactly."""
        return cls._in_place_of(conv, network, geometry=conv_geometry(conv))

    def forward(self, input: Tensor, output_size: Sequence[int] | None = None) -> Tensor:  # noqa: A002 - as torch calls it
        """(batch, in, ...) -> (batch, out, ...'); ``output_size`` as in ``nn.ConvTranspose2d``."""
        x = input
        held, dims = self._parameters["bias"], len(self.kernel_size)
        bias = None if held is None else held.to(x.dtype)
        if self.transposed:
            weight = turned(self.dense_weight(x.dtype), "conv_transpose")
            spread: Any = self._dense._output_padding  # type: ignore[attr-defined]
            padding = spread(self, x, output_size, self.stride, self.padding, self.kernel_size, dims, self.dilation)
            transpose: Any = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[dims - 1]
            return transpose(x, weight, bias, self.stride, self.padding, padding, self.groups, self.dilation)
        convolve: Any = (F.conv1d, F.conv2d, F.conv3d)[dims - 1]
        geometry = {name: getattr(self, name) for name in GEOMETRY if name != "padding_mode"}
        if all(_splits_out(term) for term in self.spec.terms) and geometry["groups"] == 1:
            parts = []
            for term, (out, rest) in zip(self.spec.terms, self.cores(x.dtype)):
                narrow = convolve(x, rest.reshape(term.ranks[0], *self.spec.shape[1:]), **geometry)
                parts.append(convolve(narrow, out.reshape(*out.shape, *[1] * dims)))
            y = parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)
            return y if bias is None else y + bias.reshape(-1, *[1] * dims)
        return convolve(x, self.dense_weight(x.dtype), bias, **geometry)

    @property
    def weight(self) -> Tensor:
        """The contracted kernel as the replaced module kept it; computed at each access."""
        return loaded(turned(super().weight, "conv_transpose" if self.transposed else "conv"))

    def materialize(self) -> nn.Module:
        """The dense convolution in the original dtype."""
        options: dict[str, Any] = {name: getattr(self, name) for name in GEOMETRY} | {"bias": self.bias is not None}
        if self.transposed:
            options["output_padding"] = self.output_padding
        layer: Any = self._dense(self.in_channels, self.out_channels, self.kernel_size, device="meta", **options)
        return self._made_dense(layer)


class TNConv2d(TNConv):
    """A 2-d convolution whose kernel (out, in/groups, height, width) is a network."""

    axes = ("out", "in/groups", "height", "width")

    @classmethod
    def from_conv2d(cls, conv: nn.Conv2d, network: TensorNetwork) -> TNConv2d:
        """Replace an ``nn.Conv2d``; as ``from_conv``."""
        return cls._in_place_of(conv, network, geometry=conv_geometry(conv))


def conv_geometry(conv: Any) -> dict[str, Any]:
    """What a ``TNConv`` needs to know of a convolution beside its kernel; JSON-ready."""
    names = (*GEOMETRY, "output_padding") if conv.transposed else GEOMETRY
    values = {name: getattr(conv, name) for name in names}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def _splits_out(term: TermSpec) -> bool:
    return term.layout.is_native and term.topology.legs == ((0,), tuple(range(1, len(term.layout.dims))))
