"""The entropy coder is a bijection close to the entropy, agrees with a plain reference, and refuses damaged bytes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from tensornet_compress.coding import rans
from tensornet_compress.errors import CheckpointError


def tables(seed: int, count: int, symbols: int) -> rans.Tables:
    """Random frequency tables; some symbols have none."""
    generator = np.random.default_rng(seed)
    weights = generator.exponential(size=(count, symbols)) ** 3
    weights[:, 1:] *= generator.random((count, symbols - 1)) > 0.2
    return rans.Tables.from_frequencies(rans.normalise(weights))


def drawn(
    known: rans.Tables, rows: int, columns: int, seed: int
) -> tuple[NDArray[np.uint8], NDArray[np.int64], NDArray[np.int64]]:
    """Symbols drawn from the tables, and the table numbers of rows and columns."""
    generator = np.random.default_rng(seed)
    split = generator.integers(0, len(known.frequency))
    row_table = generator.integers(0, split + 1, rows)
    column_table = generator.integers(0, len(known.frequency) - split, columns)
    which = row_table[:, None] + column_table
    slots = known.slots.reshape(len(known.frequency), rans.TOTAL)
    symbols = slots[which, generator.integers(0, rans.TOTAL, which.shape)] & 255
    return symbols.astype(np.uint8), row_table, column_table


def plainly_decoded(payload: NDArray[np.uint8], which: NDArray[np.int64], known: rans.Tables) -> list[int]:
    """The textbook decoder, one symbol after the other in whole numbers of Python."""
    lanes = rans.lane_count(len(which))
    states = [int(state) for state in payload[: 4 * lanes].view("<u4")]
    words = [int(word) for word in payload[4 * lanes :].view("<u2")]
    symbols = []
    for place, table in enumerate(which):
        state = states[place % lanes]
        slot = state % rans.TOTAL
        symbol = int(np.searchsorted(np.cumsum(known.frequency[table]), slot, side="right"))
        state = int(known.frequency[table, symbol]) * (state // rans.TOTAL) + slot - int(known.start[table, symbol])
        states[place % lanes] = state if state >= 1 << 16 else (state << 16) | words.pop(0)
        symbols.append(symbol)
    assert not words
    assert set(states) <= {1 << 16}
    return symbols


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 200), st.integers(0, 100), st.integers(1, 5), st.integers(2, 64), st.integers(0, 2**32 - 1))
def test_round_trip(rows: int, columns: int, table_count: int, symbols: int, seed: int) -> None:
    known = tables(seed, table_count, symbols)
    grid, row_table, column_table = drawn(known, rows, columns, seed)
    coded = rans.encode(grid, row_table, column_table, known)
    assert np.array_equal(rans.decode(coded, row_table, column_table, known), grid)


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (7, 300), (90, 101)])
def test_agrees_with_the_textbook(rows: int, columns: int) -> None:
    known = tables(5, 4, 20)
    grid, row_table, column_table = drawn(known, rows, columns, 6)
    coded = rans.encode(grid, row_table, column_table, known)
    assert plainly_decoded(coded, (row_table[:, None] + column_table).ravel(), known) == grid.ravel().tolist()


def test_rate_is_near_the_entropy() -> None:
    known = tables(1, 3, 32)
    grid, row_table, column_table = drawn(known, 1000, 400, 0)
    ideal = -np.log2(known.frequency[row_table[:, None] + column_table, grid] / rans.TOTAL).sum()
    spent = 8 * len(rans.encode(grid, row_table, column_table, known))
    assert ideal <= spent + 32 <= 1.02 * ideal + 64


@pytest.mark.parametrize("damage", ["short", "long", "changed"])
def test_damaged_bytes_are_refused(damage: str) -> None:
    known = tables(2, 1, 16)
    grid, row_table, column_table = drawn(known, 50, 100, 2)
    coded = rans.encode(grid, row_table, column_table, known)
    broken = {"short": coded[:-2], "long": np.append(coded, np.zeros(2, np.uint8)), "changed": coded.copy()}[damage]
    if damage == "changed":
        broken[9] ^= 0xFF
    with pytest.raises(CheckpointError):
        rans.decode(broken, row_table, column_table, known)


@settings(deadline=None, max_examples=60)
@given(st.binary(max_size=400), st.integers(0, 80), st.integers(0, 80))
def test_any_bytes_end_in_symbols_or_an_error(data: bytes, rows: int, columns: int) -> None:
    known = tables(3, 1, 16)
    payload = np.frombuffer(data, np.uint8)
    try:
        grid = rans.decode(payload, np.zeros(rows, np.int64), np.zeros(columns, np.int64), known)
    except CheckpointError:
        return
    assert grid.shape == (rows, columns)


def test_tables_that_do_not_sum_up_are_refused() -> None:
    for counts in ([[4000, 95]], [[5000, -904]], [4096]):
        with pytest.raises(CheckpointError):
            rans.Tables.from_frequencies(np.array(counts))


def test_normalised_tables_keep_every_offered_symbol() -> None:
    weights = np.array([[1.0, 1e-9, 0.0, 5.0], [1e-12, 1.0, 1.0, 0.0]])
    counts = rans.normalise(weights)
    assert (counts.sum(1) == 1 << rans.PRECISION).all()
    assert ((counts > 0) == (weights > 0)).all()
