"""Products with coded numbers agree with the decoded matrix, whatever the codes, the number of inputs, dtype and threads."""

from __future__ import annotations

import numba
import pytest
import torch
from torch import Tensor

from tensornet_compress.coding import parse_format
from tensornet_compress.coding.bits import pack_bits
from tensornet_compress.coding.codes import Codes
from tensornet_compress.coding.packed_integers import IntFormat
from tensornet_compress.kernels.coded_linear import MOST_ROWS, coded_linear, decoded_linear
from tensornet_compress.kernels.loops import loops_for

GROUPED = ("int4g64z", "int4g0o", "int4g32o", "int3g64z", "int2g64", "int5g128z", "int6g64o", "int7g0z", "int8g64")


def by_factors(m: int, n: int, bits: int = 8, beyond: int = 5, seed: int = 0) -> Codes:
    """Random codes with a factor a row and a column, and some beyond their range."""
    generator = torch.Generator().manual_seed(seed)
    half = 1 << (bits - 1)
    codes = torch.randint(-half, half, (m, n), generator=generator)
    row, column = torch.rand(m, 1, generator=generator) + 0.1, torch.rand(n, generator=generator) + 0.1
    place = torch.randperm(m * n, generator=generator)[:beyond].sort().values.int()
    excess = torch.randint(-900, 900, (len(place),), generator=generator, dtype=torch.int32)
    stored = codes.to(torch.int8) if bits == 8 else pack_bits(codes + half, bits)
    return Codes(stored, row, None, column, place, excess, bits, n, n)


def by_groups(m: int, n: int, name: str, seed: int = 0) -> Codes:
    """A random matrix in an integer format."""
    fmt = parse_format(name)
    assert isinstance(fmt, IntFormat)
    return fmt.operands(fmt.encode(torch.randn(m, n, generator=torch.Generator().manual_seed(seed))), (m, n))


def inputs(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def assert_agrees(x: Tensor, codes: Codes, tolerance: float = 2e-6) -> None:
    exact = decoded_linear(x.double(), codes)
    y = coded_linear(x, codes)
    assert (y.dtype, y.shape) == (x.dtype, exact.shape)
    # A sum is as exact as its largest terms allow.
    largest = x.double().abs() @ codes.dense(torch.float64).abs().T
    assert ((y.double() - exact).abs() <= tolerance * largest).all()


@pytest.mark.parametrize("rows", [1, 2, 7, MOST_ROWS, MOST_ROWS + 1, 50])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("m", "n"), [(1, 2), (3, 70), (400, 330)])
def test_codes_with_factors_and_exceptions(rows: int, bits: int, m: int, n: int) -> None:
    assert_agrees(inputs(rows, n), by_factors(m, n, bits, beyond=min(5, m * n)))


@pytest.mark.parametrize("name", GROUPED)
@pytest.mark.parametrize(("rows", "n"), [(1, 64), (3, 192), (16, 576), (40, 128)])
def test_packed_codes_in_groups(name: str, rows: int, n: int) -> None:
    codes = by_groups(33, max(n, parse_format(name).group), name)  # type: ignore[union-attr]
    assert loops_for(codes) is not None
    # Packed codes are summed before zero points are taken off, which are up to 2^8 times as large.
    assert_agrees(inputs(rows, codes.width), codes, 2e-5)


def test_a_ragged_last_group() -> None:
    assert_agrees(inputs(2, 200), by_groups(7, 200, "int4g128z"), 2e-5)


@pytest.mark.parametrize(("name", "n"), [("int3g64z", 129), ("int4g48", 96), ("int5g0", 7)])
def test_what_loops_do_not_take_goes_to_the_reference(name: str, n: int) -> None:
    codes = by_groups(5, n, name)
    assert loops_for(codes) is None
    assert_agrees(inputs(2, n), codes)


@pytest.mark.parametrize("rows", [2, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_every_dtype(dtype: torch.dtype, rows: int) -> None:
    x = 0.1 * inputs(rows, 3, 64)
    for codes in (by_factors(40, 64), by_groups(40, 64, "int4g64z")):
        y, wanted = coded_linear(x.to(dtype), codes), decoded_linear(x.to(dtype).double(), codes)
        assert (y.dtype, tuple(y.shape)) == (dtype, (rows, 3, 40))
        assert (y.double() - wanted).abs().max() < (4 * torch.finfo(dtype).eps + 1e-6) * wanted.abs().max()


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("rows", [1, 30])
def test_threads_do_not_change_the_result_and_are_left_as_found(threads: int, rows: int) -> None:
    codes, x = by_factors(2000, 300), inputs(rows, 300)
    before = torch.get_num_threads(), numba.get_num_threads()
    try:
        torch.set_num_threads(threads)
        assert_agrees(x, codes)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before[0])
    assert numba.get_num_threads() == before[1]


@pytest.mark.parametrize("codes", [by_factors(12, 20), by_groups(12, 64, "int4g32z")])
def test_gradients_of_inputs_and_the_operator_itself(codes: Codes) -> None:
    x = inputs(3, codes.width).requires_grad_()
    coded_linear(x, codes).square().sum().backward()
    again = x.detach().clone().requires_grad_()
    decoded_linear(again, codes).square().sum().backward()
    torch.testing.assert_close(x.grad, again.grad, rtol=1e-3, atol=1e-2)
    torch.library.opcheck(torch.ops.tensornet_compress.coded_linear.default, (x, *codes))


@pytest.mark.parametrize("rows", [1, 40])
def test_compiles_without_graph_breaks(rows: int) -> None:
    codes, x = by_groups(12, 64, "int4g64"), inputs(rows, 64)
    compiled = torch.compile(coded_linear, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x, codes), coded_linear(x, codes))


@pytest.mark.parametrize("name", ["int4g64z", "int3g0z", "int5g32", "int8g0o"])
def test_rows_are_those_of_the_whole(name: str) -> None:
    codes, wanted = by_groups(9, 67, name), torch.tensor([8, 0, 0, 5])
    assert torch.equal(codes.rows(wanted).dense(torch.float32), codes.dense(torch.float32)[wanted])
