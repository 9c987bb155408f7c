"""How numbers are stored: floats, packed integers, entropy-coded integers, permutations, and what each costs in bytes."""

from tensornet_compress.coding.coded_format import CodedFormat
from tensornet_compress.coding.formats import (
    FloatFormat,
    IntFormat,
    NamedFormat,
    NumberFormat,
    PivotFormat,
    format_nbytes,
    parse_format,
)
from tensornet_compress.coding.permutations import pack_permutation, packed_permutation_nbytes, unpack_permutation

__all__ = [
    "CodedFormat",
    "FloatFormat",
    "IntFormat",
    "NamedFormat",
    "NumberFormat",
    "PivotFormat",
    "format_nbytes",
    "pack_permutation",
    "packed_permutation_nbytes",
    "parse_format",
    "unpack_permutation",
]
