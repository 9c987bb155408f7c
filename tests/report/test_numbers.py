"""Numbers as people read them."""

from __future__ import annotations

import pytest

from tensornet_compress.report import Measure
from tensornet_compress.report.page.numbers import amount, number, plain, setting, short, significant, with_unit


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0 bytes"), (999, "999 bytes"), (1000, "1.00 kB"), (173_106_432, "173 MB"), (2.5e9, "2.50 GB"), (float("inf"), "∞")],
)
def test_amounts(value: float, text: str) -> None:
    assert amount(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (3.0, "3"),
        (12345.0, "12,345"),
        (0.1, "0.1"),
        (1 / 3, "0.3333"),
        (3e-7, "3.000e-07"),
        (float("nan"), "not a number"),
    ],
)
def test_numbers(value: float, text: str) -> None:
    assert number(value) == text


def test_significant_digits_do_not_lose_zeros_that_count() -> None:
    assert significant(3.0042, 3) == "3.00"
    assert significant(0.0996, 2) == "0.100"
    assert significant(123456.7, 3) == "123,457"


def test_shares_become_percentages_and_one_is_singular() -> None:
    assert with_unit(0.869, Measure(title="same best token", better="higher")) == "86.9 %"
    assert with_unit(0.869, Measure(title="mean cosine", better="higher")) == "0.869"
    assert with_unit(1, Measure(title="x", unit="bits")) == "1 bit"


def test_names_lose_controls_and_are_cut_in_the_middle() -> None:
    assert plain("a\x00b\u202ec\n") == "a b c "
    assert short("model.layers.12.self_attn.q_proj", 20) == "model.layers….q_proj"
    assert short("x" * 10, 10) == "x" * 10
    assert len(short("x" * 99, 20)) == 20


def test_settings() -> None:
    assert setting({"a": [1, 2.5, None], "b": True}) == "a: 1, 2.5, none; b: yes"
    assert setting([]) == "none"
