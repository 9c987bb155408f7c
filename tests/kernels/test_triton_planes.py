"""Products with packed fields on GPUs agree with unpacked fields, in Triton's interpreter."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch

from tensornet_compress.coding.planes import PlaneLayout, Planes
from tensornet_compress.kernels import plane_products as operator
from tests.kernels.interpreter import interpreted

pytest.importorskip("triton")


@pytest.fixture
def kernels() -> Iterator[ModuleType]:
    with interpreted("triton_planes") as module:
        operator.proved.cache_clear()
        yield module
        operator.proved.cache_clear()


@pytest.mark.parametrize("bits", [(0, 1, 2, 3, 4, 5, 6, 8), (4,) * 40, (1,), (0, 0, 2)])
@pytest.mark.parametrize("rows", [1, 9, 30])
@pytest.mark.parametrize("units", [(1,), (2, 1), (9, 3)])
def test_agree_with_unpacked_fields(kernels: ModuleType, bits: tuple[int, ...], rows: int, units: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    layout, tokens = PlaneLayout.of(torch.tensor(bits)), 64 * sum(units)
    codes = torch.stack([torch.randint(0, 1 << b, (2, tokens), generator=generator) for b in bits], -1)
    planes = Planes(tuple(layout.pack(part) for part in codes.split([64 * count for count in units], 1)))
    fields = layout.unpack(layout.pack(codes)).double()
    factors = torch.randn(2, rows, layout.count, generator=generator)
    weights = torch.randn(2, rows, tokens, generator=generator)
    torch.testing.assert_close(
        kernels.times_planes(factors, layout, planes).double(), factors.double() @ fields, atol=1e-4, rtol=1e-4
    )
    found = kernels.planes_times(layout, planes, weights).double()
    torch.testing.assert_close(found, weights.double() @ fields.mT, atol=2e-3, rtol=1e-4)


def test_they_are_used_once_they_agree_with_the_reference(kernels: ModuleType) -> None:
    assert operator.proved("cpu") is kernels


@pytest.mark.parametrize("name", ["times_planes", "planes_times"])
def test_one_that_fails_or_errs_gives_way_to_the_reference_and_says_so(
    kernels: ModuleType, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = getattr(kernels, name)
    for wrong in (lambda *given: 2 * right(*given), lambda *_: 1 / 0):
        monkeypatch.setattr(kernels, name, wrong)
        operator.proved.cache_clear()
        with pytest.warns(UserWarning, match="attention over coded tokens on cpu unpacks them first"):
            assert operator.proved("cpu") is None


@pytest.mark.parametrize("name", ["_times", "_sums"])
def test_they_compile_for_a_gpu_that_is_not_here(name: str) -> None:
    from triton import compiler
    from triton.backends.compiler import GPUTarget

    function = getattr(importlib.reload(importlib.import_module("tensornet_compress.kernels.triton_planes")), name)
    known = {"ROWS": 16, "FIELDS": 32, "UNIT": 64, "WIDTH": 4, "SPLIT": 8}
    fixed = {argument: known[argument] for argument in function.arg_names if argument in known}
    types = dict.fromkeys(("factors", "weights", "out"), "*fp32") | dict.fromkeys(
        ("plane", "plane4", "plane2", "plane1"), "*u8"
    )
    signature = {argument: "constexpr" if argument in fixed else types.get(argument, "i32") for argument in function.arg_names}
    places = {(function.arg_names.index(argument),): value for argument, value in fixed.items()}
    made = compiler.compile(compiler.ASTSource(function, signature, places), target=GPUTarget("cuda", 80, 32))
    assert made.asm["cubin"]
    assert made.metadata.shared <= 64 << 10
