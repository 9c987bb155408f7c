"""Allocation against all combinations."""

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tensornet_compress.compressing import choose_options, uniform_options
from tensornet_compress.errors import BudgetError
from tensornet_compress.options import Option, pareto
from tensornet_compress.tensor import NetworkSpec


@st.composite
def problems(draw):
    layers = draw(st.integers(1, 4))
    nbytes = [[draw(st.integers(1, 60)) for _ in range(draw(st.integers(1, 4)))] for _ in range(layers)]
    damage = [[draw(st.floats(0, 10)) for _ in sizes] for sizes in nbytes]
    smallest, largest = sum(map(min, nbytes)), sum(map(max, nbytes))
    return nbytes, damage, draw(st.integers(smallest, largest + 5))


def total(table, picks):
    return sum(row[pick] for row, pick in zip(table, picks))


@given(problems(), st.sampled_from([1, 10**6]))
def test_near_the_best_of_all_combinations_within_the_bytes(problem, unit):
    """One multiplier gives the best combination of its own bytes; what it misses of the budget is worth less than one layer."""
    nbytes, damage, allowed = problem
    nbytes, allowed = [[unit * size for size in sizes] for sizes in nbytes], unit * allowed
    picks = choose_options(nbytes, damage, allowed)
    assert total(nbytes, picks) <= allowed
    combinations = product(*(range(len(sizes)) for sizes in nbytes))
    best = min(total(damage, c) for c in combinations if total(nbytes, c) <= allowed)
    assert total(damage, picks) <= best + max(max(values) - min(values) for values in damage) + 1e-12


@given(st.integers(1, 6), st.integers(0, 3))
def test_a_few_bytes_more_than_allowed_are_too_many(layers, spare):
    """Large layers whose options differ by one byte."""
    size = 10**9
    nbytes, damage = [[size, size + 1]] * layers, [[1.0, 0.0]] * layers
    allowed = layers * size + min(spare, layers)
    picks = choose_options(nbytes, damage, allowed)
    assert total(nbytes, picks) <= allowed
    assert total(damage, picks) == layers - min(spare, layers)


def test_an_exact_fit_is_found():
    assert choose_options([[10, 20], [10, 30]], [[5.0, 1.0], [5.0, 1.0]], 50) == [1, 1]
    assert choose_options([[10], [10]], [[1.0], [1.0]], 20) == [0, 0]


@given(problems())
def test_what_cannot_be_met_is_refused_with_both_numbers(problem):
    nbytes, damage, _ = problem
    smallest = sum(map(min, nbytes))
    with pytest.raises(BudgetError, match=rf"{smallest - 1:,} bytes.*{smallest:,}"):
        choose_options(nbytes, damage, smallest - 1)


@given(problems(), st.floats(1, 70))
def test_the_uniform_allocator_gives_each_layer_its_own_share(problem, share):
    nbytes, damage, _ = problem
    shares = [share + layer for layer in range(len(nbytes))]
    if any(min(sizes) > own for sizes, own in zip(nbytes, shares)):
        with pytest.raises(BudgetError, match="smallest option"):
            uniform_options(nbytes, damage, shares)
        return
    for sizes, values, own, pick in zip(nbytes, damage, shares, uniform_options(nbytes, damage, shares)):
        assert sizes[pick] <= own
        assert values[pick] == min(value for value, size in zip(values, sizes) if size <= own)


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(0, 9)), min_size=1, max_size=12))
def test_the_front_holds_exactly_what_nothing_beats(pairs):
    spec = NetworkSpec.dense((1, 1))
    front = {(o.nbytes, o.error) for o in pareto([Option("dense", spec, size, float(error)) for size, error in pairs])}
    beaten = {(a, b) for a, b in pairs if any((c <= a and d < b) or (c < a and d <= b) for c, d in pairs)}
    assert front == {(a, float(b)) for a, b in pairs if (a, b) not in beaten}
