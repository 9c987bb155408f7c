"""Entropy-coded integers come back exactly, near their entropy, and damage is refused."""

from __future__ import annotations

from contextlib import suppress

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from tensornet_compress.coding import laws, rans, trellis
from tensornet_compress.coding.coded_integers import coded_bits, decode_integers, encode_integers
from tensornet_compress.decompose.one_step import Canceller
from tensornet_compress.errors import CheckpointError, CodeError
from tests import file_reader


def gaussian(
    rows: int, columns: int, scale: float, seed: int
) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.int32]]:
    """Codes of scales that vary over rows and columns, and the scales in quarter octaves."""
    generator = np.random.default_rng(seed)
    row, column = generator.integers(-6, 7, rows, np.int32), generator.integers(-5, 6, columns, np.int32)
    spread = scale * 2.0 ** ((row[:, None] + column) / 4)
    return np.rint(generator.normal(size=(rows, columns)) * spread).astype(np.int32), row, column


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 60), st.integers(0, 60), st.floats(-8, 20), st.integers(0, 2**32 - 1))
def test_codes_come_back(rows: int, columns: int, octave: float, seed: int) -> None:
    codes, row, column = gaussian(rows, columns, 2.0**octave, seed)
    data = encode_integers(codes, row, column)
    assert np.array_equal(decode_integers(data, row, column), codes)


def test_codes_far_outside_what_was_foretold_come_back() -> None:
    codes = np.zeros((40, 50), np.int32)
    codes[3, 7], codes[20, 1], codes[39, 49] = 1 << 30, -(1 << 30), -77
    zeros = np.zeros(40, np.int32), np.zeros(50, np.int32)
    assert np.array_equal(decode_integers(encode_integers(codes, *zeros), *zeros), codes)


@pytest.mark.parametrize("scale", [0.1, 0.7, 3.0, 20.0, 500.0])
def test_the_rate_of_a_gaussian_is_near_its_entropy(scale: float) -> None:
    codes, row, column = gaussian(800, 600, scale, 1)
    spread = scale * 2.0 ** ((row[:, None] + column) / 4)
    # The exact entropy of a rounded Gaussian of each entry's own spread.
    from scipy.stats import norm

    chance = norm.cdf((codes + 0.5) / spread) - norm.cdf((codes - 0.5) / spread)
    ideal = -np.log2(chance).mean()
    spent = 8 * len(encode_integers(codes, row, column)) / codes.size
    assert ideal - 0.01 < spent < 1.01 * ideal + 0.012
    assert coded_bits(codes, row, column) / codes.size == pytest.approx(spent, abs=0.003)


def test_every_law_is_a_table_and_has_its_mean() -> None:
    codes = np.arange(-laws.HALF, laws.HALF + 1)
    for law in range(laws.LAWS):
        counts = laws.frequencies(law)
        assert counts.sum() == rans.TOTAL
        assert counts.min() >= 0
        assert counts[laws.HALF] > 0
        assert counts[laws.ESCAPE] > 0
        mean = 2.0 ** (laws.LOWEST + law % laws.SCALES / laws.PER_OCTAVE)
        if 1 <= mean <= 2:
            assert (np.abs(codes) * counts[:-1]).sum() / rans.TOTAL == pytest.approx(mean, rel=0.1)


def test_the_laws_never_change() -> None:
    # A stored file names laws by number: these tables are part of the file format.
    from hashlib import sha256

    digest = sha256(b"".join(laws.frequencies(law).astype("<u2").tobytes() for law in range(laws.LAWS))).hexdigest()
    assert digest == "1c74f8b8266f15af62aecdea4e658404923e7a75d6a4934ea27094329a7a97d3"


@settings(deadline=None, max_examples=80)
@given(st.data())
def test_damaged_bytes_are_refused_or_give_codes(data: st.DataObject) -> None:
    codes, row, column = gaussian(20, 30, 5.0, 3)
    coded = encode_integers(codes, row, column)
    kind = data.draw(st.sampled_from(["cut", "flip", "noise"]))
    if kind == "cut":
        coded = coded[: data.draw(st.integers(0, len(coded) - 1))]
    elif kind == "flip":
        coded = coded.copy()
        coded[data.draw(st.integers(0, len(coded) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    else:
        coded = np.frombuffer(data.draw(st.binary(max_size=300)), np.uint8)
    with suppress(CheckpointError):
        assert decode_integers(coded, row, column).shape == codes.shape


def paths(rows: int, columns: int, scale: float, seed: int) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.int32]]:
    """Columns of a trellis near Gaussian values of scales that vary, and the scales of their levels."""
    generator = np.random.default_rng(seed)
    row, column = generator.integers(-3, 4, rows, np.int32), generator.integers(-3, 4, columns, np.int32)
    values = generator.normal(size=(rows, columns)) * scale * 2.0 ** ((row[:, None] + column) / 4)
    codes, path = np.empty((rows, columns), np.int32), np.empty(rows, np.int32)
    for i in range(columns):
        trellis.best_path(values[:, i].copy(), np.zeros(rows, np.int64), np.zeros((2, 1, 32)), path)
        codes[:, i] = path
    assert rows * columns < 2 or scale < 1 or np.abs(codes - values).mean() < 0.75
    return codes, row, column - 4


@settings(deadline=None, max_examples=15)
@given(st.integers(1, 9), st.floats(0.1, 8), st.integers(0, 2**32 - 1))
def test_the_path_is_the_best_of_all_that_the_table_allows(rows: int, scale: float, seed: int) -> None:
    generator = np.random.default_rng(seed)
    values, bits = generator.normal(size=rows) * scale, generator.uniform(0, 1, (2, 3, 6)).cumsum(-1)
    kinds, found = generator.integers(0, 3, rows), np.empty(rows, np.int32)
    trellis.best_path(values, kinds, bits, found)
    least: dict[int, float] = {0: 0.0}
    for value, kind in zip(values, kinds):
        after: dict[int, float] = {}
        for state, cost in least.items():
            odd = state & 1
            near = int((abs(value) + odd) * 0.5)
            for level in {*range(max(near - 1, 0), near + 2), *([0] if near in (2, 3) else [])}:
                size = 2 * level - odd if level else 0
                paid = cost + (abs(value) - size) ** 2 + bits[odd, kind, min(level, 5)]
                to = int(trellis.NEXT[state, level & 1])
                after[to] = min(after.get(to, np.inf), paid)
        least = after
    level, side = trellis.levels(found[:, None])
    paid = ((values - found) ** 2).sum() + sum(bits[s, k, min(abs(v), 5)] for s, k, v in zip(side[:, 0], kinds, level[:, 0]))
    assert np.isclose(paid, min(least.values()))


def test_values_that_are_no_numbers_break_nothing() -> None:
    for strange in (np.nan, np.inf, -np.inf, 1e300, 4e9):
        values, codes = np.array([1.0, strange, -2.0] * 5), np.empty(15, np.int32)
        trellis.best_path(values, np.zeros(15, np.int64), np.zeros((2, 1, 32)), codes)


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 60), st.integers(0, 60), st.floats(-4, 20), st.integers(0, 2**32 - 1))
def test_paths_of_a_trellis_come_back(rows: int, columns: int, octave: float, seed: int) -> None:
    codes, row, column = paths(rows, columns, 2.0**octave, seed)
    data = encode_integers(codes, row, column, 8)
    assert np.array_equal(encode_integers(codes.copy(), row, column, 8, overwrite=True), data)
    assert np.array_equal(decode_integers(data, row, column), codes)
    if codes.size:
        assert np.array_equal(file_reader.coded_integers(data, row.astype(int), column.astype(int)), codes)
        assert coded_bits(codes, row, column, 8) <= 8 * len(data)


def test_integers_that_are_no_path_are_refused() -> None:
    zeros = np.zeros(4, np.int32), np.zeros(5, np.int32)
    with pytest.raises(CodeError, match="no paths of the trellis"):
        encode_integers(np.ones((4, 5), np.int32), *zeros, states=8)


@settings(deadline=None, max_examples=150)
@given(st.integers(0, 2**32 - 1), st.sampled_from(["flip", "cut", "grow"]))
def test_damaged_paths_are_refused_or_decoded_but_never_crash(seed: int, how: str) -> None:
    codes, row, column = paths(30, 20, 40.0, 5)
    data, chance = encode_integers(codes, row, column, 8), np.random.default_rng(seed)
    place = int(chance.integers(len(data)))
    broken = data[:place] if how == "cut" else np.concatenate([data, data[: place + 1]]) if how == "grow" else data.copy()
    if how == "flip":
        broken[place] ^= 1 << int(chance.integers(8))
    with suppress(CheckpointError):
        assert decode_integers(broken, row, column).shape == codes.shape


@pytest.mark.parametrize("bits", [1.2, 2.0, 3.0, 4.0])
def test_a_trellis_loses_a_sixth_less_at_equal_bits(bits: float) -> None:
    """On white noise the best that integers one by one can do is 1.53 dB from the bound, at these rates."""
    matrix = torch.randn(1000, 200, generator=torch.Generator().manual_seed(0))
    canceller, found = Canceller.of(None, 200), {}
    for states in (0, 8):
        points = []
        for step in np.geomspace(0.2, 2.0, 12):
            coded = canceller.codes(matrix, None, float(step), states=states)
            error = float(np.square(matrix.numpy() - coded.to_dense()).mean())
            points.append((8 * len(coded.to_bytes()) / matrix.numel(), error))
        rates, errors = zip(*sorted(points))
        found[states] = np.exp(np.interp(bits, rates, np.log(errors)))
    assert found[8] < 0.86 * found[0]
