from math import prod

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tensornet_compress.errors import TensorNetError
from tensornet_compress.tensor import Tensorization, choose_radices
from tests.generators import radices_for


@st.composite
def tensorizations(draw):
    shape = tuple(draw(st.lists(st.integers(1, 11), min_size=1, max_size=3)))
    return Tensorization(shape=shape, radices=tuple(draw(radices_for(size)) for size in shape))


@given(tensorizations())
def test_every_entry_survives_and_padding_is_zero(tensorization):
    entries = torch.arange(1, prod(tensorization.shape) + 1).reshape(tensorization.shape)
    modes = tensorization.apply(entries)
    assert torch.equal(tensorization.invert(modes), entries)
    assert modes.shape == tensorization.modes
    assert sorted(modes[modes != 0].tolist()) == entries.flatten().tolist()
    assert int((modes == 0).sum()) == tensorization.padding


@given(tensorizations())
def test_digits_are_the_mixed_radix_digits_of_an_index(tensorization):
    entries = torch.arange(prod(tensorization.shape)).reshape(tensorization.shape)
    modes = tensorization.apply(entries)
    grid = torch.meshgrid(*(torch.arange(size) for size in tensorization.shape), indexing="ij")
    digits = [digit for axis, index in enumerate(grid) for digit in tensorization.digits(axis, index)]
    assert torch.equal(modes[tuple(digits)], entries)


def test_digits_are_most_significant_first():
    tensorization = Tensorization(shape=(24,), radices=((2, 3, 4),))
    assert [int(d) for d in tensorization.digits(0, torch.tensor(23))] == [1, 2, 3]
    assert [int(d) for d in tensorization.digits(0, torch.tensor(12))] == [1, 0, 0]


@pytest.mark.parametrize(
    ("shape", "radices"), [((6,), ((2, 2),)), ((6,), ((6,), (1,))), ((6,), ((),)), ((0,), ((1,),)), ((6,), ((0, 9),))]
)
def test_impossible_radices_are_refused_with_what_was_given(shape, radices):
    with pytest.raises(ValueError, match=r"radices"):
        Tensorization(shape=shape, radices=radices)


def test_a_tensor_of_another_shape_is_refused():
    tensorization = Tensorization(shape=(6,), radices=((2, 3),))
    with pytest.raises(TensorNetError, match=r"\(6,\).*\(5,\)"):
        tensorization.apply(torch.zeros(5))
    with pytest.raises(TensorNetError, match=r"\(2, 3\).*\(6,\)"):
        tensorization.invert(torch.zeros(6))


@given(st.integers(1, 400), st.integers(1, 4), st.sampled_from([0.0, 0.05, 0.1, 0.5]))
def test_chosen_radices_hold_the_axis_within_the_allowed_padding(size, parts, share):
    radices = choose_radices(size, parts, share)
    assert size <= prod(radices) <= size * (1 + share)
    assert 1 <= len(radices) <= parts
    assert cost(radices, size) <= size
    assert cost(radices, size) <= cost(choose_radices(size, parts, 0.0), size)


def cost(radices, size):
    """What choices are compared by: numbers of a train at equal ranks, a tenth more where there is padding."""
    return (1.1 if prod(radices) > size else 1.0) * sum(radices) * prod(radices) / size


def two_factor_costs(size, share):
    for padded in range(size, int(size * (1 + share)) + 1):
        weight = (1.1 if padded > size else 1.0) * padded / size
        yield padded * weight
        yield from ((a + padded // a) * weight for a in range(2, padded) if padded % a == 0)


@given(st.integers(2, 300))
def test_two_radices_are_the_cheapest_pair_there_is(size):
    assert cost(choose_radices(size, 2, 0.1), size) == pytest.approx(min(two_factor_costs(size, 0.1)))


@pytest.mark.parametrize("prime", [101, 257, 8191])
def test_primes_are_padded_when_that_pays(prime):
    assert choose_radices(prime, 2, 0.0) == (prime,)
    padded = choose_radices(prime, 2, 0.1)
    assert prod(padded) > prime
    assert cost(padded, prime) < prime


@pytest.mark.parametrize(("size", "parts", "share"), [(0, 1, 0.1), (4, 0, 0.1), (4, 2, -0.1)])
def test_impossible_requests_for_radices_are_refused(size, parts, share):
    with pytest.raises(TensorNetError, match=str(size)):
        choose_radices(size, parts, share)
