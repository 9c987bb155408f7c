"""One bisection: the least number that is kept, between bounds or without."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tensornet_compress.bisection import bracket, least_kept


@given(st.floats(1e-20, 1e20), st.booleans())
def test_the_least_number_that_is_kept_is_found_to_the_last_digit(threshold: float, bounded: bool) -> None:
    def keeps(number: float) -> bool:
        return number >= threshold

    low, high = (1e-25, 1e25) if bounded else bracket(keeps)
    assert least_kept(keeps, low, high) == pytest.approx(threshold, rel=1e-15)
    coarse = least_kept(keeps, low, high, ratio=1.01)
    assert threshold <= coarse <= 1.01 * threshold


def test_ends_are_not_asked_and_the_upper_one_is_the_answer_where_nothing_below_it_is_kept() -> None:
    asked: list[float] = []

    def never(number: float) -> bool:
        asked.append(number)
        return False

    assert least_kept(never, 1.0, 8.0, steps=5) == 8.0
    assert len(asked) == 5
    assert all(1.0 < number < 8.0 for number in asked)
    assert least_kept(never, 8.0, 8.0) == 8.0


def test_zero_is_a_lower_bound() -> None:
    assert bracket(lambda number: True) == (0.0, 1e-30)
    assert least_kept(lambda number: number >= 3e-40, 0.0, 1e-30) == pytest.approx(3e-40, rel=1e-12)
    with pytest.raises(ValueError, match="nothing"):
        bracket(lambda number: False)
