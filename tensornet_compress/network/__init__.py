"""Tensor networks: specs, topologies, number formats, contraction."""

from tensornet_compress.network.contraction import Program, plan_contraction
from tensornet_compress.network.formats import (
    FloatFormat,
    IntFormat,
    NumberFormat,
    PivotFormat,
    format_nbytes,
    parse_format,
)
from tensornet_compress.network.network import TensorNetwork, check_stored, contract_term, expected_tensors
from tensornet_compress.network.spec import NetworkSpec, TermSpec
from tensornet_compress.network.topology import Topology

__all__ = [
    "FloatFormat",
    "IntFormat",
    "NetworkSpec",
    "NumberFormat",
    "PivotFormat",
    "Program",
    "TensorNetwork",
    "TermSpec",
    "Topology",
    "check_stored",
    "contract_term",
    "expected_tensors",
    "format_nbytes",
    "parse_format",
    "plan_contraction",
]
