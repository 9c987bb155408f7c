import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tensornet_compress.coding.bits import pack_bits, packed_nbytes, unpack_bits
from tensornet_compress.errors import TensorNetError


@given(st.integers(1, 8), st.data())
def test_packing_takes_exactly_its_bits_and_comes_back(bits, data):
    values = data.draw(st.lists(st.integers(0, 2**bits - 1), max_size=40))
    packed = pack_bits(torch.tensor(values, dtype=torch.int64), bits)
    assert packed.dtype == torch.uint8
    assert packed.numel() == packed_nbytes(len(values), bits) == -(-len(values) * bits // 8)
    assert unpack_bits(packed, bits, len(values)).tolist() == values


@given(st.integers(1, 8), st.lists(st.integers(0, 1), min_size=1, max_size=30))
def test_the_stream_is_little_endian_without_gaps(bits, values):
    packed = pack_bits(torch.tensor(values), bits)
    stream = sum(value << (bits * position) for position, value in enumerate(values))
    assert int.from_bytes(bytes(packed.tolist()), "little") == stream


@pytest.mark.parametrize("bits", [3, 4, 7])
def test_strips_of_many_values_follow_each_other_without_gaps(bits):
    values = torch.randint(0, 2**bits, ((1 << 20) + 13,), generator=torch.Generator().manual_seed(bits), dtype=torch.uint8)
    packed = pack_bits(values, bits)
    assert torch.equal(unpack_bits(packed, bits, len(values)), values)
    # Strips begin at whole bytes.
    border = (1 << 20) * bits // 8
    assert torch.equal(packed[border:], pack_bits(values[1 << 20 :], bits))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.float32])
def test_values_of_any_dtype_and_shape_are_packed(dtype):
    values = torch.randint(0, 8, (5, 7)).to(dtype)
    assert torch.equal(unpack_bits(pack_bits(values, 3), 3, 35).view(5, 7), values.to(torch.uint8))


def test_values_beyond_the_width_are_refused():
    for values in ([0, 8], [-1, 3]):
        with pytest.raises(TensorNetError, match=rf"from {values[0]} to {values[1]} do not fit 3 bits"):
            pack_bits(torch.tensor(values), 3)


@pytest.mark.parametrize("bits", [0, 9])
def test_widths_beyond_a_byte_are_refused(bits):
    with pytest.raises(TensorNetError, match=f"given {bits}"):
        pack_bits(torch.tensor([0]), bits)
    with pytest.raises(TensorNetError, match=f"given {bits}"):
        unpack_bits(torch.zeros(1, dtype=torch.uint8), bits, 1)


def test_a_wrong_number_of_bytes_is_refused():
    with pytest.raises(TensorNetError, match="5 integers of 3 bits take 2 bytes, found 3"):
        unpack_bits(torch.zeros(3, dtype=torch.uint8), 3, 5)
