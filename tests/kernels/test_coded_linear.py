"""Products with int8 codes agree with the decoded matrix, whatever the number of inputs, dtype and threads."""

from __future__ import annotations

import numba
import pytest
import torch
from torch import Tensor

from tensornet_compress.kernels.coded_linear import MOST_ROWS, coded_linear, decoded_linear


def coded(m: int, n: int, beyond: int = 5, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Random codes with some beyond int8, and steps."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-127, 128, (m, n), generator=generator, dtype=torch.int8)
    row, column = torch.rand(m, generator=generator) + 0.1, torch.rand(n, generator=generator) + 0.1
    place = torch.randperm(m * n, generator=generator)[:beyond].sort().values
    return codes, row, column, place, torch.randint(-900, 900, (beyond,), generator=generator, dtype=torch.int32)


@pytest.mark.parametrize("rows", [1, 2, 7, MOST_ROWS, MOST_ROWS + 1, 50])
@pytest.mark.parametrize(("m", "n"), [(1, 1), (3, 70), (400, 330)])
def test_agrees_with_the_decoded_matrix(rows: int, m: int, n: int) -> None:
    parts = coded(m, n, beyond=min(5, m * n))
    x = torch.randn(rows, n, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(coded_linear(x, *parts), decoded_linear(x, *parts), rtol=2e-5, atol=2e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_every_dtype(dtype: torch.dtype) -> None:
    parts = coded(40, 64)
    x = 0.1 * torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(1))
    y = coded_linear(x.to(dtype), *parts)
    assert (y.dtype, tuple(y.shape)) == (dtype, (2, 3, 40))
    wanted = decoded_linear(x.to(dtype).double(), *parts)
    assert (y.double() - wanted).abs().max() < (4 * torch.finfo(dtype).eps + 1e-6) * wanted.abs().max()


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_do_not_change_the_result_and_are_left_as_found(threads: int) -> None:
    parts = coded(2000, 300)
    x = torch.randn(1, 300, generator=torch.Generator().manual_seed(1))
    before = torch.get_num_threads(), numba.get_num_threads()
    try:
        torch.set_num_threads(threads)
        y = coded_linear(x, *parts)
    finally:
        torch.set_num_threads(before[0])
    assert numba.get_num_threads() == before[1]
    torch.testing.assert_close(y, decoded_linear(x, *parts), rtol=2e-5, atol=2e-3)


def test_gradients_of_inputs_and_the_operator_itself() -> None:
    parts = coded(12, 20)
    x = torch.randn(3, 20, requires_grad=True)
    coded_linear(x, *parts).square().sum().backward()
    again = x.detach().clone().requires_grad_()
    decoded_linear(again, *parts).square().sum().backward()
    torch.testing.assert_close(x.grad, again.grad, rtol=1e-3, atol=1e-2)
    torch.library.opcheck(torch.ops.tensornet_compress.coded_linear.default, (x, *parts))


def test_compiles_without_graph_breaks() -> None:
    parts = coded(12, 20)
    x = torch.randn(1, 20)
    compiled = torch.compile(coded_linear, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x, *parts), coded_linear(x, *parts))
