"""Codes and scales improved in turns: never worse, at rest only where no single change helps, and true to what is stored."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tensornet_compress.coding import parse_format
from tensornet_compress.decompose import ErrorFeedback
from tensornet_compress.decompose.code_descent import improved_codes
from tests.generators import SEEDS, correlated_moment, random_tensor

FORMATS = ["int2g32z", "int2g0z", "int3g32", "int3g64z", "int4g32o", "int4g0", "int8g64"]


def start(seed: int, name: str, run: int, rows: int = 6):
    weight, moment, fmt = random_tensor((rows, run), seed, torch.float32), correlated_moment(run, seed), parse_format(name)
    scale, zero = fmt.fit_grid(weight)
    return weight, moment, fmt, fmt.quantise(weight, scale, zero), scale, zero


def row_errors(weight, moment, fmt, codes, scale, zero):
    lost = (weight - fmt.decode(fmt.assemble(codes, scale, zero), tuple(weight.shape), torch.float32)).double()
    return ((lost @ moment.double()) * lost).sum(1)


@settings(max_examples=60)
@given(SEEDS, st.sampled_from(FORMATS), st.sampled_from([64, 96, 150]), st.integers(1, 3))
def test_no_row_gets_worse_as_stored(seed, name, run, rounds):
    weight, moment, fmt, *given_ = start(seed, name, run)
    before = row_errors(weight, moment, fmt, *given_)
    after = row_errors(weight, moment, fmt, *improved_codes(weight, moment, fmt, *given_, rounds))
    assert bool((after <= before * (1 + 1e-5) + 1e-9).all())
    assert float(after.sum()) < float(before.sum())


@settings(max_examples=20)
@given(SEEDS, st.sampled_from(["int2g0z", "int3g0", "int3g0o"]))
def test_at_rest_no_single_code_is_better_elsewhere(seed, name):
    weight, moment, fmt, *given_ = start(seed, name, 12, rows=2)
    codes, scale, zero = improved_codes(weight, moment, fmt, *given_, 200)
    least = row_errors(weight, moment, fmt, codes, scale, zero)
    for column in range(12):
        for code in range(fmt.levels + 1):
            tried = codes.clone()
            tried[:, column] = code
            assert bool((row_errors(weight, moment, fmt, tried, scale, zero) >= least * (1 - 1e-4) - 1e-9).all())


def test_scales_end_near_their_least_squares_values():
    weight, moment, fmt, *given_ = start(5, "int3g0o", 16, rows=3)
    codes, scale, zero = improved_codes(weight, moment, fmt, *given_, 200)
    factor = torch.linalg.cholesky(moment.double())
    for row in range(3):
        design = torch.stack([codes[row].double(), torch.ones(16, dtype=torch.float64)], 1)
        best = torch.linalg.lstsq(factor.T @ design, factor.T @ weight[row].double()).solution
        assert float(scale[row, 0]) == pytest.approx(float(best[0]), rel=5e-3)
        assert float(zero[row, 0]) == pytest.approx(float(best[1]), rel=2e-2)


def test_integer_zero_points_and_the_stored_scale_stay_exact():
    weight, moment, fmt, codes, scale, zero = start(1, "int4g32z", 64)
    points = (-zero / scale).round()
    _, new_scale, new_zero = improved_codes(weight, moment, fmt, codes, scale, zero, 3)
    assert torch.equal((-new_zero / new_scale).round(), points)
    assert torch.equal(new_scale.half().float(), new_scale)


def test_zero_and_constant_rows_stay_as_they_are():
    weight = torch.cat([torch.zeros(1, 64), torch.full((1, 64), 0.5), random_tensor((1, 64), 0, torch.float32)])
    moment = correlated_moment(64, 0)
    for name in FORMATS:
        fmt = parse_format(name)
        decoded = fmt.decode(ErrorFeedback(moment).encode(weight, fmt), (3, 64), torch.float32)
        assert bool(torch.isfinite(decoded).all())
        assert torch.equal(decoded[0], torch.zeros(64))


def test_no_rounds_change_nothing():
    weight, moment, fmt, *given_ = start(2, "int3g64z", 64)
    for one, other in zip(improved_codes(weight, moment, fmt, *given_, 0), given_):
        assert one is other


def test_the_given_tensors_are_left_alone():
    weight, moment, fmt, *given_ = start(3, "int4g32o", 64)
    copies = [part.clone() for part in (weight, moment, *given_)]
    improved_codes(weight, moment, fmt, *given_, 2)
    assert all(torch.equal(part, copy) for part, copy in zip((weight, moment, *given_), copies))
