"""How numbers are stored: floats, packed integers, entropy-coded integers, permutations, and what each costs in bytes."""

from tensornet_compress.coding.coded_format import CodedFormat
from tensornet_compress.coding.formats import (
    EntropyCoded,
    FloatFormat,
    IntFormat,
    NamedFormat,
    NumberFormat,
    PivotFormat,
    format_nbytes,
    parse_format,
)
from tensornet_compress.coding.permutations import pack_permutation, packed_permutation_nbytes, unpack_permutation
from tensornet_compress.coding.sorted_format import SortedFormat

__all__ = [
    "CodedFormat",
    "EntropyCoded",
    "FloatFormat",
    "IntFormat",
    "NamedFormat",
    "NumberFormat",
    "PivotFormat",
    "SortedFormat",
    "format_nbytes",
    "pack_permutation",
    "packed_permutation_nbytes",
    "parse_format",
    "unpack_permutation",
]
