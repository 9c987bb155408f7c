"""``y = x W'`` with W in coded numbers, for a few inputs on a GPU: codes are read as they lie in memory and multiplied in fp32.

One program makes some outputs of all inputs. Codes of any width are cut from two bytes of the packed stream. Those that do not
fit (``Codes.place``) are few, and are added afterwards.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tensornet_compress.coding.bits import unpack_bits
from tensornet_compress.coding.codes import Codes

_OUTPUTS, _WIDTH, _LEAST_INPUTS = 32, 64, 16
"""A tile of the matrix, and the fewest columns that a product of tiles takes."""


def few_inputs(x: Tensor, codes: Codes) -> Tensor:
    """``x W'`` for x (k, width) in any floating dtype -> (k, m), summed in fp32."""
    count, (m, groups) = len(x), codes.scale.shape
    scale, given = codes.scale.float().contiguous(), x.float()
    if codes.column is not None:
        given = given * codes.column.float()
    zero = _zeros(codes, scale)
    y = torch.empty(count, m, device=x.device)
    # Triton launches on the current device, whatever that of its tensors.
    with torch.cuda.device_of(x):
        _multiply[(triton.cdiv(m, _OUTPUTS),)](
            given.contiguous(), codes.codes, scale, scale if zero is None else zero, y, count, m, codes.width, groups,
            codes.codes.numel(), GROUP=codes.group if groups > 1 else codes.width, BITS=codes.bits, SIGNED=codes.signed,
            MIDDLE=0 if codes.signed or (zero is not None) else 1 << (codes.bits - 1), SHIFTED=zero is not None,
            INPUTS=max(_LEAST_INPUTS, triton.next_power_of_2(count)), OUTPUTS=_OUTPUTS, STEP=_WIDTH,
        )  # fmt: skip
    if codes.place is not None and codes.excess is not None and len(codes.place):
        row, column = codes.place // codes.width, codes.place % codes.width
        y.index_add_(1, row, given[:, column] * (codes.excess.float() * scale[row, 0]))
    return y.to(x.dtype)


def _zeros(codes: Codes, scale: Tensor) -> Tensor | None:
    """What is added to each group, fp32 (m, groups); None where the middle code stands for zero."""
    if codes.zero is None or codes.column is not None:
        return None
    if codes.zero.is_floating_point():
        return codes.zero.float().contiguous()
    return -scale * unpack_bits(codes.zero, codes.bits, scale.numel()).view_as(scale).float()


@triton.jit
def _multiply(  # type: ignore[no-untyped-def]
    x, codes, scale, zero, y, count, m, width, groups, nbytes, GROUP: tl.constexpr, BITS: tl.constexpr, SIGNED: tl.constexpr,
    MIDDLE: tl.constexpr, SHIFTED: tl.constexpr, INPUTS: tl.constexpr, OUTPUTS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    output = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    number = tl.arange(0, INPUTS)
    there = (output < m)[:, None]
    total = tl.full((OUTPUTS, INPUTS), 0.0, tl.float32)
    for start in range(0, width, STEP):
        column = start + tl.arange(0, STEP)
        inside = there & (column < width)[None, :]
        place = output.to(tl.int64)[:, None] * width + column[None, :]
        if SIGNED:
            code = tl.load(codes + place, mask=inside, other=0).to(tl.float32)
        else:
            bit = place * BITS
            byte = bit >> 3
            low = tl.load(codes + byte, mask=inside, other=0).to(tl.int32)
            high = tl.load(codes + byte + 1, mask=inside & (byte + 1 < nbytes), other=0).to(tl.int32)
            shifted = (low | (high << 8)) >> (bit & 7).to(tl.int32)
            code = ((shifted & ((1 << BITS) - 1)) - MIDDLE).to(tl.float32)
        group = output[:, None] * groups + column[None, :] // GROUP
        value = code * tl.load(scale + group, mask=inside, other=0.0)
        if SHIFTED:
            value += tl.load(zero + group, mask=inside, other=0.0)
        value = tl.where(inside, value, 0.0)
        given = tl.load(
            x + number[None, :] * width + column[:, None],
            mask=(column < width)[:, None] & (number < count)[None, :],
            other=0.0,
        )
        total += tl.dot(value, given, input_precision="ieee")
    tl.store(y + number[None, :] * m + output[:, None], total, mask=there & (number < count)[None, :])
