"""What orders cost: exact integers and factorials as the oracle."""

from math import factorial, log2

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tensornet_compress.coding import pack_permutation, packed_permutation_nbytes, unpack_permutation
from tensornet_compress.errors import TensorNetError
from tensornet_compress.tensor import FibreOrder, Layout, permutation_bits
from tests.generators import permutations


def ceil_log2_factorial(n: int) -> int:
    bits = 0
    while (1 << bits) < factorial(n):
        bits += 1
    return bits


@given(st.integers(1, 60).flatmap(permutations))
def test_a_packed_permutation_takes_its_information_content_and_comes_back(permutation):
    n = len(permutation)
    packed = pack_permutation(permutation)
    assert packed.dtype == torch.uint8
    assert packed.numel() == packed_permutation_nbytes(n) == -(-ceil_log2_factorial(n) // 8)
    assert unpack_permutation(packed, n) == permutation


def test_large_permutations_come_back():
    permutation = torch.randperm(1500).tolist()
    assert unpack_permutation(pack_permutation(permutation), 1500) == tuple(permutation)


def test_packing_is_onto_one_number_per_permutation():
    from itertools import permutations as all_permutations

    codes = {bytes(pack_permutation(p).tolist()) for p in all_permutations(range(5))}
    assert codes == {number.to_bytes(1, "little") for number in range(120)}


@pytest.mark.parametrize("permutation", [(0, 0), (1, 2), (0, 2), (-1, 0)])
def test_what_is_no_permutation_is_refused(permutation):
    with pytest.raises(TensorNetError, match="not a permutation"):
        pack_permutation(permutation)
    with pytest.raises(ValueError, match="not a permutation"):
        FibreOrder(axis=0, permutation=permutation)


def test_damaged_packed_permutations_are_refused():
    with pytest.raises(TensorNetError, match=r"5!"):
        unpack_permutation(torch.tensor([120], dtype=torch.uint8), 5)
    with pytest.raises(TensorNetError, match="takes 1 bytes"):
        unpack_permutation(torch.tensor([1, 0], dtype=torch.uint8), 5)
    with pytest.raises(TensorNetError, match="int64"):
        unpack_permutation(torch.tensor([1]), 5)


@given(st.integers(1, 120))
def test_prices_are_logarithms_of_factorials(n):
    assert permutation_bits(n) == pytest.approx(log2(factorial(n)), rel=1e-12, abs=1e-9)


def test_absorbed_orders_are_free_and_others_are_charged_in_the_layout():
    permutation = tuple(reversed(range(100)))
    charged, free = FibreOrder(axis=0, permutation=permutation), FibreOrder(axis=1, permutation=permutation, absorbed=True)
    layout = Layout.of(((100,), (100,)), fibre_orders=(charged, free))
    assert free.nbytes == 0
    assert layout.order_nbytes == charged.nbytes == -(-ceil_log2_factorial(100) // 8)
