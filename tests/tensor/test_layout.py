from math import prod

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tensornet_compress.errors import TensorNetError
from tensornet_compress.tensor import FibreOrder, Layout
from tests.generators import layouts, permutations


@given(layouts())
def test_every_layout_is_a_bijection_onto_the_unpadded_entries(layout):
    entries = torch.arange(1, prod(layout.shape) + 1).reshape(layout.shape)
    laid_out = layout.apply(entries)
    assert laid_out.shape == layout.dims
    assert torch.equal(layout.invert(laid_out), entries)
    assert sorted(laid_out[laid_out != 0].tolist()) == entries.flatten().tolist()


@given(layouts())
def test_layouts_are_plain_data(layout):
    assert Layout.from_json(layout.to_json()) == layout


@given(layouts())
def test_positions_show_the_digits_they_say(layout):
    """Moving along one position changes the index of its own axis only."""
    assert len(layout.position_axes) == len(layout.dims)
    for axis in range(len(layout.shape)):
        positions = layout.axis_positions(axis)
        assert tuple(layout.dims[p] for p in positions) == layout.tensorization.radices[axis]
        assert {p for p, owner in enumerate(layout.position_axes) if owner == axis} == set(positions)


@given(layouts())
def test_native_means_that_nothing_moves(layout):
    if layout.is_native:
        entries = torch.arange(prod(layout.shape)).reshape(layout.shape)
        assert torch.equal(layout.apply(entries), entries)


def test_the_native_layout_is_native_and_free():
    layout = Layout.native((3, 4, 5))
    assert layout.is_native
    assert layout.order_nbytes == 0
    assert not Layout.of(((3,), (4,)), mode_order=(1, 0)).is_native
    assert not Layout.of(((3,), (2, 2))).is_native


@given(st.data(), st.integers(1, 9))
def test_fibre_orders_compose_and_invert(data, n):
    first = FibreOrder(axis=1, permutation=data.draw(permutations(n)))
    second = FibreOrder(axis=1, permutation=data.draw(permutations(n)))
    x = torch.arange(2 * n).reshape(2, n)
    assert torch.equal(first.then(second).apply(x), second.apply(first.apply(x)))
    assert torch.equal(first.invert(first.apply(x)), x)
    assert torch.equal(first.apply(first.invert(x)), x)
    assert first.then(first.inverse()).permutation == tuple(range(n))


def test_position_shows_the_named_fibre():
    order = FibreOrder(axis=0, permutation=(2, 0, 1))
    assert order.apply(torch.tensor([10, 11, 12])).tolist() == [12, 10, 11]


@pytest.mark.parametrize("other", [FibreOrder(axis=1, permutation=(1, 0)), FibreOrder(axis=0, permutation=(0, 1, 2))])
def test_orders_of_different_axes_or_lengths_do_not_compose(other):
    with pytest.raises(TensorNetError, match="compose"):
        FibreOrder(axis=0, permutation=(1, 0)).then(other)


@pytest.mark.parametrize(
    "fields",
    [
        {"mode_order": (0, 0)},
        {"mode_order": (0,)},
        {"fibre_orders": (FibreOrder(axis=2, permutation=(0,)),)},
        {"fibre_orders": (FibreOrder(axis=0, permutation=(0, 1)),)},
        {"fibre_orders": (FibreOrder(axis=0, permutation=(0, 2, 1)), FibreOrder(axis=0, permutation=(0, 1, 2)))},
    ],
)
def test_orders_that_do_not_fit_are_refused(fields):
    with pytest.raises(ValueError, match=r"order"):
        Layout.of(((3,), (4,)), **fields)


def test_a_tensor_of_another_shape_is_refused_with_both_shapes():
    with pytest.raises(TensorNetError, match=r"\(3, 4\).*\(4, 3\)"):
        Layout.native((3, 4)).apply(torch.zeros(4, 3))
    with pytest.raises(TensorNetError, match=r"\(3, 4\).*\(4, 3\)"):
        Layout.native((3, 4)).invert(torch.zeros(4, 3))
