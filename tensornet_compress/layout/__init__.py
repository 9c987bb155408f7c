"""Where the entries of a tensor lie on indices: tensorization, ordering, and the two together."""

from tensornet_compress.layout.layout import Layout
from tensornet_compress.layout.ordering import FibreOrder, entry_order_bits, mode_order_bits, permutation_bits
from tensornet_compress.layout.packing import pack_permutation, packed_permutation_nbytes, unpack_permutation
from tensornet_compress.layout.radices import RadixChoice, choose_radices
from tensornet_compress.layout.tensorization import Tensorization

__all__ = [
    "FibreOrder",
    "Layout",
    "RadixChoice",
    "Tensorization",
    "choose_radices",
    "entry_order_bits",
    "mode_order_bits",
    "pack_permutation",
    "packed_permutation_nbytes",
    "permutation_bits",
    "unpack_permutation",
]
