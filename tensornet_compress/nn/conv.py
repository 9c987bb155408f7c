"""TNConv2d: a convolution whose kernel (out, in/groups, height, width) is a network."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tensornet_compress.errors import TensorNetError
from tensornet_compress.nn.module import NetworkModule
from tensornet_compress.tensor import NetworkSpec, TensorNetwork, TermSpec

GEOMETRY = ("stride", "padding", "dilation", "groups", "padding_mode")


class TNConv2d(NetworkModule):
    """A 2-d convolution; a network cut as (out)|(in, height, width) runs as a narrow convolution and a 1x1 one, any other
    network is contracted to its kernel first."""

    axes = ("out", "in/groups", "height", "width")

    def __init__(
        self,
        spec: NetworkSpec,
        geometry: dict[str, Any],
        stored: dict[str, Tensor] | None = None,
        bias: Tensor | None = None,
    ):
        """``geometry``: stride, padding, dilation, groups and padding_mode as in ``nn.Conv2d``; what that module tells of
        itself can be read off this one too."""
        super().__init__(spec, stored, bias)
        if set(geometry) != set(GEOMETRY):
            raise TensorNetError(f"TNConv2d needs {', '.join(GEOMETRY)}, was given {sorted(geometry)}")
        if geometry["padding_mode"] != "zeros":
            raise TensorNetError(f"padding_mode {geometry['padding_mode']!r} is not supported; use 'zeros'")
        for name, value in geometry.items():
            setattr(self, name, tuple(value) if isinstance(value, list) else value)
        self.out_channels, self.in_channels = spec.shape[0], spec.shape[1] * geometry["groups"]
        self.kernel_size, self.transposed, self.output_padding = (spec.shape[2], spec.shape[3]), False, (0, 0)

    @classmethod
    def from_conv2d(cls, conv: nn.Conv2d, network: TensorNetwork) -> TNConv2d:
        """Replace an ``nn.Conv2d`` by a network of its kernel; bias and geometry are kept exactly."""
        return cls._in_place_of(conv, network, geometry=conv_geometry(conv))

    def forward(self, x: Tensor) -> Tensor:
        """(batch, in, height, width) -> (batch, out, height', width')."""
        geometry = {name: getattr(self, name) for name in GEOMETRY if name != "padding_mode"}
        held = self._parameters["bias"]
        bias = None if held is None else held.to(x.dtype)
        if all(_splits_out(term) for term in self.spec.terms) and geometry["groups"] == 1:
            parts = []
            for term, (out, rest) in zip(self.spec.terms, self.cores(x.dtype)):
                narrow = F.conv2d(x, rest.reshape(term.ranks[0], *self.spec.shape[1:]), **geometry)
                parts.append(F.conv2d(narrow, out[:, :, None, None]))
            y = parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)
            return y if bias is None else y + bias[:, None, None]
        return F.conv2d(x, self.dense_weight(x.dtype), bias, **geometry)

    def materialize(self) -> nn.Conv2d:
        """The dense ``nn.Conv2d`` in the original dtype."""
        options: dict[str, Any] = {name: getattr(self, name) for name in GEOMETRY} | {"bias": self.bias is not None}
        conv = nn.Conv2d(self.in_channels, self.out_channels, self.kernel_size, device="meta", **options)
        conv.weight = nn.Parameter(self.weight.detach())
        if (bias := self._parameters["bias"]) is not None:
            conv.bias = nn.Parameter(bias.detach().clone())
        return conv.train(self.training)


def conv_geometry(conv: nn.Conv2d) -> dict[str, Any]:
    """What ``TNConv2d`` needs to know of a convolution beside its kernel; JSON-ready."""
    values = {name: getattr(conv, name) for name in GEOMETRY}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def _splits_out(term: TermSpec) -> bool:
    return term.layout.is_native and term.topology.legs == ((0,), (1, 2, 3))
