"""Products of floats with packed codes (small unsigned integers), in integer arithmetic where the processor has it.

The float side is written as three signed bytes (24 bits, as many as a float holds), so that one product of bytes with 32-bit
sums gives what a product in fp32 would, from a quarter of the memory traffic. Without such instructions codes become fp32.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from tensornet_compress.coding.planes import PlaneLayout, Planes

_LARGEST = 127 << 16
_LONGEST = 1 << 19
"""Terms of one sum: codes are at most 15 and bytes 128, so 32 bits hold four times as many."""
_SHORTEST = 2048
"""Tokens from which on cutting floats into bytes costs less than it saves (measured on 2 cores)."""


def integer_products(device: torch.device) -> bool:
    """Whether products of bytes pay there: 3 to 4 times faster than fp32 on x86 with VNNI, slower without it."""
    return device.type == "cpu" and bool(torch.cpu._is_vnni_supported())


def times_planes(factors: Tensor, layout: PlaneLayout, planes: Planes) -> Tensor:
    """factors fp32 (batch, rows, k) @ fields of the codes (batch, k, tokens) -> fp32 (batch, rows, tokens), chunk by chunk."""
    integers = integer_products(factors.device)
    return torch.cat([times_codes(factors, fields, integers) for fields in _unpacked(layout, planes)], -1)


def planes_times(layout: PlaneLayout, planes: Planes, weights: Tensor) -> Tensor:
    """weights fp32 (batch, rows, tokens) @ fields of the codes, transposed, (batch, tokens, k) -> fp32 (batch, rows, k)."""
    integers, done = integer_products(weights.device), 0
    total = weights.new_zeros(*weights.shape[:2], layout.count)
    for fields in _unpacked(layout, planes):
        total += codes_times(fields, weights[:, :, done : done + fields.shape[2]], integers)
        done += fields.shape[2]
    return total


def _unpacked(layout: PlaneLayout, planes: Planes) -> Iterator[Tensor]:
    return (layout.unpack(chunk) for chunk in planes.chunks)


def times_codes(factors: Tensor, codes: Tensor, integers: bool) -> Tensor:
    """factors fp32 (batch, rows, k) @ codes uint8 0 .. 15 (batch, k, tokens) -> fp32 (batch, rows, tokens)."""
    if not integers or codes.shape[1] > _LONGEST or codes.shape[2] < _SHORTEST:
        return factors @ codes.float()
    signed = codes.view(torch.int8)
    found = []
    for left, right in zip(factors, signed):
        parts, scale = three_bytes(left)
        found.append(_joined(torch._int_mm(parts, right)) * scale)
    return torch.stack(found)


def codes_times(codes: Tensor, weights: Tensor, integers: bool) -> Tensor:
    """codes uint8 0 .. 15 (batch, k, tokens), weights fp32 (batch, rows, tokens) -> fp32 (batch, rows, k)."""
    if not integers or not _SHORTEST <= codes.shape[2] <= _LONGEST:
        return weights @ codes.float().mT
    signed = codes.view(torch.int8)
    found = []
    for left, right in zip(signed, weights):
        parts, scale = three_bytes(right)
        found.append(_joined(torch._int_mm(left, parts.mT).mT) * scale)
    return torch.stack(found)


def three_bytes(values: Tensor) -> tuple[Tensor, Tensor]:
    """fp32 (rows, n) -> int8 (3 rows, n): low, middle and high bytes of 24-bit numbers, each signed; fp32 scale (rows, 1)."""
    low, high = values.aminmax(dim=-1, keepdim=True)
    scale = torch.maximum(high, -low).div_(_LARGEST).clamp_min_(1e-37)
    # The offset makes all three bytes unsigned; flipping the top bit of each takes 128 off, which makes them signed digits.
    digits = (values / scale).round_().to(torch.int32).add_(0x808080).view(torch.uint8).bitwise_xor_(0x80)
    return digits.view(torch.int8).unflatten(-1, (-1, 4))[..., :3].permute(2, 0, 1).reshape(-1, values.shape[1]), scale


def _joined(products: Tensor) -> Tensor:
    low, middle, high = products.float().chunk(3)
    return high.mul_(256).add_(middle).mul_(256).add_(low)
