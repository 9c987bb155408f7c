"""Entropy-coded integers as the format of a core: what modules keep in memory decodes like what is stored."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tensornet_compress.coding import CodedFormat
from tensornet_compress.coding.coded_matrix import CodedMatrix


def coded(rows: int = 40, columns: int = 30, spread: float = 60.0) -> tuple[CodedFormat, dict[str, torch.Tensor], CodedMatrix]:
    """A matrix with many codes beyond int8."""
    generator = np.random.default_rng(0)
    codes = np.rint(generator.standard_t(2, (rows, columns)) * spread).astype(np.int32)
    steps = generator.integers(-30, 9, rows, np.int32), generator.integers(-20, 20, columns, np.int32)
    scales = np.zeros(rows, np.int32), np.zeros(columns, np.int32)
    matrix = CodedMatrix(codes, *steps, *scales)
    fmt = CodedFormat(step=1.0)
    parts = fmt.assemble(matrix)
    return fmt.of(parts), parts, matrix


def test_stored_bytes_are_told() -> None:
    fmt, parts, _ = coded()
    (shape, dtype), data = fmt.parts((40, 30))["_coded"], parts["_coded"]
    assert (tuple(data.shape), data.dtype) == (shape, dtype)


def test_resident_parts_decode_like_stored_ones() -> None:
    fmt, parts, matrix = coded()
    resident = fmt.resident(parts, (40, 30))
    assert resident["_near"].dtype == torch.int8
    assert len(resident["_place"]) == (np.abs(matrix.codes) > 127).sum() > 20
    exact = torch.from_numpy(matrix.to_dense())
    for given in (parts, resident):
        assert torch.allclose(fmt.decode(given, (40, 30), torch.float32), exact, rtol=1e-6)
        assert torch.allclose(fmt.decode(given, (40, 5, 6), torch.float64).float(), exact.view(40, 5, 6), rtol=1e-6)


@pytest.mark.parametrize("rows", [[], [3], [7, 7, 0, 39], list(range(39, -1, -1))])
def test_rows_decode_like_the_whole(rows: list[int]) -> None:
    fmt, parts, _ = coded()
    picked = torch.tensor(rows, dtype=torch.int64)
    whole = fmt.decode(parts, (40, 30), torch.float32)
    given = fmt.resident(parts, (40, 30))
    assert torch.equal(fmt.decode_rows(given, (40, 30), picked, torch.float32), whole[picked])


def test_rounding_to_nearest_without_a_metric() -> None:
    core = torch.randn(20, 12, generator=torch.Generator().manual_seed(0))
    fmt = CodedFormat(step=0.05)
    parts = fmt.encode(core)
    assert (fmt.of(parts).decode(parts, (20, 12), torch.float32) - core).abs().max() <= 0.05 * 2 ** (1 / 16) / 2 + 1e-6


def test_small_codes_are_kept_in_four_bits_with_the_few_that_are_beyond() -> None:
    fmt, _, matrix = coded(spread=1.0)
    few = CodedMatrix(matrix.codes.clip(-9, 8), matrix.row_step, matrix.column_step, matrix.row_scale, matrix.column_scale)
    few.codes[np.abs(few.codes) > 7] = 0
    few.codes[3, 4], few.codes[39, 29] = 400, -9
    parts = fmt.assemble(few)
    resident = fmt.resident(parts, (40, 30))
    assert (resident["_near"].numel(), len(resident["_place"])) == (40 * 30 // 2, 2)
    exact, picked = torch.from_numpy(few.to_dense()), torch.tensor([39, 3, 3])
    assert torch.allclose(fmt.decode(resident, (40, 30), torch.float32), exact, rtol=1e-6)
    assert torch.allclose(fmt.decode_rows(resident, (40, 30), picked, torch.float32), exact[picked], rtol=1e-6)
