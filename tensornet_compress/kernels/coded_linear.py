"""``y = x W'`` with W in int8 codes, a step a row and a step a column, and an excess for the few codes beyond int8.

``W[r, i] = row[r] * column[i] * (codes[r, i] + excess)``, so a product is one with small integers between two scalings:
``y = row * (codes (column * x))``. On a processor few inputs go through a compiled loop that reads a byte a weight; more
inputs, other devices and double precision decode the matrix once and multiply densely (``decoded_linear``, the reference).
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from numba import get_num_threads, njit, prange, set_num_threads
from torch import Tensor

from tensornet_compress.coding.coded_format import decode_codes

MOST_ROWS = 16
"""More inputs at once than this are multiplied with the decoded matrix."""
_LEAST_PER_THREAD = 1 << 16


def decoded_linear(x: Tensor, codes: Tensor, row: Tensor, column: Tensor, place: Tensor, excess: Tensor) -> Tensor:
    """``x W'`` by the decoded matrix: (..., n) -> (..., m) in the dtype of x."""
    return F.linear(x, decode_codes(codes, row, column, place, excess).to(x.dtype))


def coded_linear(x: Tensor, codes: Tensor, row: Tensor, column: Tensor, place: Tensor, excess: Tensor) -> Tensor:
    """``x W'`` for x (..., n) in any floating dtype -> (..., m); differentiable with respect to x.

    Arguments as ``decode_codes``. Sums are in fp32 at least, whatever the dtype of x.
    """
    flat = x.reshape(-1, x.shape[-1])
    few = 0 < len(flat) <= MOST_ROWS and x.device.type == "cpu" and x.dtype in (torch.float32, torch.bfloat16, torch.float16)
    if not few:
        return decoded_linear(x, codes, row, column, place, excess)
    return _few_rows(flat, codes, row, column, place, excess).view(*x.shape[:-1], len(codes))


@torch.library.custom_op("tensornet_compress::coded_linear", mutates_args=())
def _few_rows(x: Tensor, codes: Tensor, row: Tensor, column: Tensor, place: Tensor, excess: Tensor) -> Tensor:
    """x (k, n) -> (k, m), on the processor."""
    scaled = (x.detach().float() * column).contiguous()
    out = torch.empty(len(x), len(codes))
    before = get_num_threads()
    threads = max(1, min(torch.get_num_threads(), before, codes.numel() // _LEAST_PER_THREAD))
    product = _product if threads == 1 else _threaded_product
    try:
        set_num_threads(threads)
        product(scaled.numpy(), codes.numpy(), out.numpy())
    finally:
        set_num_threads(before)
    if len(place):
        beyond = excess.float() * scaled[:, place % codes.shape[1]]
        out.index_add_(1, place // codes.shape[1], beyond)
    return (out * row).to(x.dtype)


@_few_rows.register_fake
def _(x: Tensor, codes: Tensor, row: Tensor, column: Tensor, place: Tensor, excess: Tensor) -> Tensor:
    return x.new_empty(len(x), len(codes))


def _keep(ctx: torch.autograd.function.FunctionCtx, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])


def _backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> tuple[Tensor | None, ...]:
    weight = decode_codes(*ctx.saved_tensors)  # type: ignore[attr-defined]
    return gradient @ weight.to(gradient.dtype), None, None, None, None, None


_few_rows.register_autograd(_backward, setup_context=_keep)


def _loop(x, codes, out):  # type: ignore[no-untyped-def]
    """``out = x codes'``, a row of codes at a time."""
    n = codes.shape[1]
    for r in prange(codes.shape[0]):
        for k in range(x.shape[0]):
            total = np.float32(0)
            for i in range(n):
                total += x[k, i] * np.float32(codes[r, i])
            out[k, r] = total


_product = njit(cache=True, nogil=True, fastmath=True)(_loop)
_threaded_product = njit(cache=True, nogil=True, fastmath=True, parallel=True)(_loop)
