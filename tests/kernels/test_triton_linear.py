"""The kernel for GPUs agrees with the decoded matrix, in Triton's interpreter."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace

import pytest
import torch

from tensornet_compress.coding.codes import Codes
from tensornet_compress.kernels import coded_linear as operator
from tensornet_compress.kernels.coded_linear import decoded_linear
from tests.kernels.interpreter import interpreted
from tests.kernels.test_coded_linear import GROUPED, by_factors, by_groups, inputs

pytest.importorskip("triton")


@pytest.fixture
def kernel() -> Iterator[ModuleType]:
    with interpreted("triton_linear") as module:
        yield module


def assert_agrees(kernel: ModuleType, codes: Codes, count: int, dtype: torch.dtype = torch.float32) -> None:
    x = inputs(count, codes.width).to(dtype)
    y, exact = kernel.few_inputs(x, codes), decoded_linear(x.double(), codes)
    assert (y.dtype, y.shape) == (dtype, exact.shape)
    largest = x.double().abs() @ codes.dense(torch.float64).abs().T
    rounding = 0 if dtype is torch.float32 else torch.finfo(dtype).eps
    assert ((y.double() - exact).abs() <= 2e-6 * largest + rounding * exact.abs()).all()


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize(("m", "n"), [(1, 2), (33, 70), (70, 330)])
def test_factors_and_exceptions(kernel: ModuleType, bits: int, m: int, n: int) -> None:
    assert_agrees(kernel, by_factors(m, n, bits, beyond=min(5, m * n)), 3)


@pytest.mark.parametrize("name", GROUPED)
def test_groups(kernel: ModuleType, name: str) -> None:
    assert_agrees(kernel, by_groups(33, 192, name), 2)


@pytest.mark.parametrize("count", [1, 16, 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_inputs_of_any_number_and_dtype(kernel: ModuleType, count: int, dtype: torch.dtype) -> None:
    assert_agrees(kernel, by_factors(40, 150, 4), count, dtype)
    assert_agrees(kernel, by_groups(7, 200, "int4g128z"), count, dtype)


@pytest.mark.parametrize(("signed", "bits", "shifted"), [(True, 8, False), (False, 4, False), (False, 3, True)])
def test_it_compiles_for_a_gpu_that_is_not_here(signed: bool, bits: int, shifted: bool) -> None:
    from triton import compiler
    from triton.backends.compiler import GPUTarget

    function = importlib.reload(importlib.import_module("tensornet_compress.kernels.triton_linear"))._multiply
    fixed = {
        "GROUP": 64,
        "BITS": bits,
        "SIGNED": signed,
        "MIDDLE": 0,
        "SHIFTED": shifted,
        "INPUTS": 16,
        "OUTPUTS": 32,
        "STEP": 64,
    }
    types = dict.fromkeys(("x", "scale", "zero", "y"), "*fp32") | {"codes": "*i8" if signed else "*u8"}
    signature = {name: "constexpr" if name in fixed else types.get(name, "i32") for name in function.arg_names}
    source = compiler.ASTSource(
        function, signature, {(function.arg_names.index(name),): value for name, value in fixed.items()}
    )
    made = compiler.compile(source, target=GPUTarget("cuda", 80, 32))
    assert made.asm["cubin"]
    assert made.metadata.shared <= 64 << 10


def test_a_kernel_that_fails_or_errs_gives_way_to_the_reference_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    codes, x = by_factors(8, 16), inputs(2, 1, 16)
    for wrong in (lambda x, codes: 2 * decoded_linear(x, codes), lambda x, codes: 1 / 0):
        monkeypatch.setattr(operator, "triton_module", lambda _name, wrong=wrong: SimpleNamespace(few_inputs=wrong))
        operator._proved.cache_clear()
        with pytest.warns(UserWarning, match="products of 8-bit codes on cpu go by decoded matrices"):
            assert torch.equal(operator.on_gpu(x, codes), decoded_linear(x, codes))
    operator._proved.cache_clear()


def test_inputs_of_any_shape_reach_a_kernel_that_proved_right(kernel: ModuleType) -> None:
    operator._proved.cache_clear()
    for codes in (by_factors(8, 16), by_groups(8, 64, "int4g32o"), by_groups(8, 64, "int3g64z")):
        for shape in ((), (2,), (2, 5), (1, 2, 3)):
            x = inputs(*shape, codes.width)
            torch.testing.assert_close(operator.on_gpu(x, codes), decoded_linear(x, codes), rtol=1e-4, atol=1e-4)
        assert operator._proved(codes.bits, codes.signed, codes.column is None, codes.zero is None, "cpu") is kernel.few_inputs
    with pytest.raises(RuntimeError):
        operator.on_gpu(inputs(2, 3), by_factors(8, 16))
    operator._proved.cache_clear()
