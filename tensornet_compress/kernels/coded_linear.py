"""``y = x W'`` with W in coded numbers (``coding/codes.py``): the operator, its reference, and when loops are used.

A few inputs are multiplied with the codes as they lie in memory, which reads half a byte or a byte a weight; more inputs decode
a few megabytes of the matrix at a time and multiply densely. Nothing decoded is kept. Other devices, double precision and
layouts that the loops do not take go to the reference: the matrix decoded in PyTorch, times the inputs.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tensornet_compress.coding.codes import Codes
from tensornet_compress.kernels.loops import Loops, loops_for

MOST_ROWS = 16
"""More inputs at once than this are multiplied with decoded tiles."""
_TILE = 1 << 22
"""Weights that are decoded at once."""


def decoded_linear(x: Tensor, codes: Codes) -> Tensor:
    """The reference: ``x W'`` by the decoded matrix, (..., width) -> (..., m) in the dtype of x."""
    return F.linear(x, codes.dense(x.dtype))


def coded_linear(x: Tensor, codes: Codes) -> Tensor:
    """``x W'`` for x (..., width) in any floating dtype -> (..., m); differentiable with respect to x.

    At most ``MOST_ROWS`` inputs are summed in fp32 whatever their dtype. Runs on ``torch.get_num_threads()`` threads.
    """
    shape = x.shape
    flat = x if len(shape) == 2 else x.reshape(-1, shape[-1])
    if type(x) is not Tensor or torch.compiler.is_compiling() or (torch.is_grad_enabled() and x.requires_grad):
        y: Tensor = _operator(flat, *codes)
    else:
        y = _product(flat, codes)
    return y if len(shape) == 2 else y.view(*shape[:-1], y.shape[-1])


@torch.library.custom_op("tensornet_compress::coded_linear", mutates_args=())
def _operator(
    x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, column: Tensor | None, place: Tensor | None,
    excess: Tensor | None, bits: int, width: int, group: int,
) -> Tensor:  # fmt: skip
    """x (k, width) -> (k, m)."""
    return _product(x.detach(), Codes(codes, scale, zero, column, place, excess, bits, width, group))


@_operator.register_fake
def _(x: Tensor, codes: Tensor, scale: Tensor, *_others: Any) -> Tensor:
    return x.new_empty(len(x), len(scale))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:7])
    ctx.numbers = inputs[7:]


@torch.no_grad()
def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    return gradient @ Codes(*ctx.saved_tensors, *ctx.numbers).dense(gradient.dtype), *[None] * 9


_operator.register_autograd(_backward, setup_context=_keep)


def _product(x: Tensor, codes: Codes) -> Tensor:
    loops = loops_for(codes) if x.device.type == "cpu" and x.dtype in (torch.float32, torch.bfloat16, torch.float16) else None
    if loops is None or not len(x):
        return decoded_linear(x, codes)
    if len(x) > MOST_ROWS:
        return _by_tiles(x, codes, loops)
    y = torch.empty(len(x), len(codes.scale))
    loops.multiply(x if x.dtype is torch.float32 and x.is_contiguous() else x.float().contiguous(), y)
    return y if x.dtype is torch.float32 else y.to(x.dtype)


def _by_tiles(x: Tensor, codes: Codes, loops: Loops) -> Tensor:
    m, tile = len(codes.scale), max(1, _TILE // codes.width)
    y, dense = x.new_empty(len(x), m), torch.empty(min(tile, m), codes.width)
    for first in range(0, m, tile):
        last = min(first + tile, m)
        loops.decode(first, last, dense)
        torch.mm(x, dense[: last - first].to(x.dtype).T, out=y[:, first:last])
    return y
