"""``y = x W'`` with W in coded numbers (``coding/codes.py``): the operator, its reference, and when loops are used.

A few inputs are multiplied with the codes as they lie in memory, which reads half a byte or a byte a weight; more inputs decode
a few megabytes of the matrix at a time and multiply densely. Nothing decoded is kept. On GPUs a few inputs go to a kernel in
Triton, where it is installed, once that agreed with the reference. Other devices, double precision and layouts that loops do
not take go to the reference: the matrix decoded in PyTorch, times the inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tensornet_compress.coding.bits import pack_bits
from tensornet_compress.coding.codes import Codes
from tensornet_compress.kernels.loops import Loops, loops_for
from tensornet_compress.kernels.proof import agrees, triton_module

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
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
    if type(x) is not Tensor or torch.compiler.is_compiling() or (torch.is_grad_enabled() and x.requires_grad):
        y: Tensor = _operator(x.reshape(-1, x.shape[-1]), *codes)
        return y.view(*x.shape[:-1], y.shape[-1])
    return _product(x, codes)


def may_loop(x: Tensor) -> bool:
    """Whether ``looped_linear`` takes such inputs."""
    if type(x) is not Tensor or not x.is_cpu or torch.compiler.is_compiling() or (torch.is_grad_enabled() and x.requires_grad):
        return False
    return x.dtype in _DTYPES and bool(x.numel())


def looped_linear(x: Tensor, loops: Loops) -> Tensor:
    """``coded_linear`` by loops over codes that lie where ``loops`` says.

    Raises:
        RuntimeError: inputs of another width, as PyTorch's products do.
    """
    rows, width = loops.matrix[1:3]
    if x.shape[-1] != width:
        raise RuntimeError(f"inputs {tuple(x.shape)} cannot be multiplied with a weight ({rows}, {width})")
    count = x.numel() // width
    if count > MOST_ROWS:
        return _by_tiles(x.reshape(count, width), loops).view(*x.shape[:-1], rows)
    y = torch.empty(*x.shape[:-1], rows)
    loops.multiply(x if x.dtype is torch.float32 and x.is_contiguous() else x.float().contiguous(), count, y)
    return y if x.dtype is torch.float32 else y.to(x.dtype)


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
    if x.is_cuda and x.dtype in _DTYPES and 0 < x.numel() <= MOST_ROWS * codes.width:
        return on_gpu(x, codes)
    loops = loops_for(codes) if may_loop(x) else None
    return decoded_linear(x, codes) if loops is None else looped_linear(x, loops)


def on_gpu(x: Tensor, codes: Codes) -> Tensor:
    """``x W'`` for a few inputs x (..., width) by the kernel for GPUs, where there is one for such codes that proved right."""
    if x.is_cuda and torch.cuda.is_current_stream_capturing():
        # A proof waits for the device, which a graph cannot record.
        return decoded_linear(x, codes)
    kernel = _proved(codes.bits, codes.signed, codes.column is None, codes.zero is None, str(x.device))
    if kernel is None or x.shape[-1] != codes.width:
        return decoded_linear(x, codes)
    return kernel(x.reshape(-1, codes.width), codes).view(*x.shape[:-1], -1)


@cache
def _proved(bits: int, signed: bool, grouped: bool, middle: bool, device: str) -> Callable[[Tensor, Codes], Tensor] | None:
    """The kernel for GPUs, once it agreed with the reference on codes of a form; None, with a warning, where it did not."""
    module = triton_module("triton_linear")
    if module is None:
        return None
    kernel: Callable[[Tensor, Codes], Tensor] = module.few_inputs
    codes = _sample(bits, signed, grouped, middle, device)
    x = torch.linspace(-1, 1, 3 * codes.width, device=device).view(3, -1)
    told = f"products of {bits}-bit codes on {device} go by decoded matrices"
    return kernel if agrees(lambda: kernel(x, codes), lambda: decoded_linear(x.double(), codes), told) else None


def _sample(bits: int, signed: bool, grouped: bool, middle: bool, device: str) -> Codes:
    """Codes of a form, (40, 96)."""
    m, width, group = 40, 96, 32 if grouped else 96
    whole = torch.arange(m * width, device=device) % (1 << bits)
    stored = (whole - 128).to(torch.int8) if signed else pack_bits(whole, bits)
    scale = torch.linspace(0.5, 1, m * (width // group), device=device).view(m, -1)
    column = None if grouped else torch.linspace(0.5, 1, width, device=device)
    place = None if grouped else torch.arange(5, device=device, dtype=torch.int32) * 97
    return Codes(stored, scale, None if middle else scale - 2, column, place, place, bits, width, group)


def _by_tiles(x: Tensor, loops: Loops) -> Tensor:
    m, width = loops.matrix[1:3]
    tile = max(1, _TILE // width)
    y, dense = x.new_empty(len(x), m), torch.empty(min(tile, m), width)
    for first in range(0, m, tile):
        last = min(first + tile, m)
        loops.decode(first, last, dense)
        torch.mm(x, dense[: last - first].to(x.dtype).T, out=y[:, first:last])
    return y
