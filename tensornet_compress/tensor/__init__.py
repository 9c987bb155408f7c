"""Layouts, topologies, specs and networks: where the entries of a tensor lie, and the cores that hold them."""

from tensornet_compress.tensor.array import TensorArray
from tensornet_compress.tensor.contraction import Program, plan_contraction
from tensornet_compress.tensor.layout import Layout
from tensornet_compress.tensor.network import TensorNetwork, check_stored, contract_term, expected_parts, expected_tensors
from tensornet_compress.tensor.ordering import FibreOrder, permutation_bits
from tensornet_compress.tensor.radices import choose_radices
from tensornet_compress.tensor.spec import DTYPES, NetworkSpec, TermSpec
from tensornet_compress.tensor.tensorization import Tensorization
from tensornet_compress.tensor.topology import Topology

__all__ = [
    "DTYPES",
    "FibreOrder",
    "Layout",
    "NetworkSpec",
    "Program",
    "TensorArray",
    "TensorNetwork",
    "Tensorization",
    "TermSpec",
    "Topology",
    "check_stored",
    "choose_radices",
    "contract_term",
    "expected_parts",
    "expected_tensors",
    "permutation_bits",
    "plan_contraction",
]
