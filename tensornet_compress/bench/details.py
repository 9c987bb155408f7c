"""The parts of a compressed layer's bytes, for the ledger of a report."""

from __future__ import annotations

from tensornet_compress.tensor import NetworkSpec


def part_of(name: str, spec: NetworkSpec) -> str:
    """The part of the ledger that a stored tensor belongs to."""
    if name.endswith("_scale"):
        return "scales"
    if name.endswith("_zero"):
        return "zero points"
    if name.endswith("_q"):
        return "codes" if spec.is_dense else "factor codes"
    return "dense numbers" if spec.is_dense else "factors"
