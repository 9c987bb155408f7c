"""The entropy coder is a bijection close to the entropy, and damaged bytes are refused."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tensornet_compress.coding import rans
from tensornet_compress.errors import CheckpointError


def tables(seed: int, count: int, symbols: int) -> rans.Tables:
    """Random frequency tables; some symbols have none."""
    generator = np.random.default_rng(seed)
    weights = generator.exponential(size=(count, symbols)) ** 3
    weights[:, 1:] *= generator.random((count, symbols - 1)) > 0.2
    return rans.Tables.from_frequencies(rans.normalise(weights))


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 20_000), st.integers(1, 5), st.integers(2, 64), st.integers(0, 2**32 - 1))
def test_round_trip(count: int, table_count: int, symbols: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    known = tables(seed, table_count, symbols)
    which = generator.integers(0, table_count, count)
    stream = known.symbol_of_slot[which, generator.integers(0, 1 << rans.PRECISION, count)]
    coded = rans.encode(stream, which, known)
    assert np.array_equal(rans.decode(coded, which, known), stream)


def test_rate_is_near_the_entropy() -> None:
    generator = np.random.default_rng(0)
    known = tables(1, 3, 32)
    which = generator.integers(0, 3, 400_000)
    stream = known.symbol_of_slot[which, generator.integers(0, 1 << rans.PRECISION, len(which))]
    ideal = -np.log2(known.frequency[which, stream] / (1 << rans.PRECISION)).sum()
    spent = 8 * len(rans.encode(stream, which, known))
    assert ideal <= spent + 32 <= 1.02 * ideal + 64


@pytest.mark.parametrize("damage", ["short", "long", "changed"])
def test_damaged_bytes_are_refused(damage: str) -> None:
    generator = np.random.default_rng(2)
    known = tables(2, 1, 16)
    which = np.zeros(5000, np.int64)
    stream = known.symbol_of_slot[which, generator.integers(0, 1 << rans.PRECISION, 5000)]
    coded = rans.encode(stream, which, known)
    broken = {"short": coded[:-2], "long": np.append(coded, np.zeros(2, np.uint8)), "changed": coded.copy()}[damage]
    if damage == "changed":
        broken[9] ^= 0xFF
    with pytest.raises(CheckpointError):
        rans.decode(broken, which, known)


def test_normalised_tables_keep_every_offered_symbol() -> None:
    weights = np.array([[1.0, 1e-9, 0.0, 5.0], [1e-12, 1.0, 1.0, 0.0]])
    counts = rans.normalise(weights)
    assert (counts.sum(1) == 1 << rans.PRECISION).all()
    assert ((counts > 0) == (weights > 0)).all()
