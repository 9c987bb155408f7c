"""What a report draws beside the figures: networks and the parts of their bytes."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from tensornet_compress.network import NetworkSpec
from tensornet_compress.nn.module import NetworkModule
from tensornet_compress.results import Drawing

_MOST_DRAWINGS = 4


def drawing(title: str, spec: NetworkSpec) -> Drawing:
    """The networks of a sum, side by side. Legs are named by axis (``out``, ``in`` for matrices) and size."""
    names = ("out", "in") if len(spec.shape) == 2 else tuple(f"axis {axis}" for axis in range(len(spec.shape)))
    legs: list[tuple[str, ...]] = []
    edges: list[tuple[int, int, int]] = []
    for term in spec.terms:
        start = len(legs)
        axes, dims = term.layout.position_axes, term.layout.dims
        legs += [tuple(f"{names[axes[p]]} {dims[p]}" for p in core) for core in term.topology.legs]
        edges += [(start + a, start + b, rank) for (a, b), rank in zip(term.topology.edges, term.ranks)]
    return Drawing(title=title, legs=tuple(legs), edges=tuple(edges))


def drawings(modules: Mapping[str, nn.Module]) -> tuple[Drawing, ...]:
    """The kinds of networks that a model uses most, each by its first layer."""
    kinds: dict[tuple[object, ...], list[str]] = {}
    for name, module in modules.items():
        if isinstance(module, NetworkModule):
            key = tuple((term.topology, term.layout.dims) for term in module.spec.terms)
            kinds.setdefault(key, []).append(name)
    most = sorted(kinds.values(), key=len, reverse=True)[:_MOST_DRAWINGS]
    found = []
    for names in most:
        module = modules[names[0]]
        assert isinstance(module, NetworkModule)
        more = "" if len(names) == 1 else f" and {len(names) - 1} more"
        found.append(drawing(f"{names[0]}{more}: {module.spec.describe()}", module.spec))
    return tuple(found)


def part_of(name: str, spec: NetworkSpec) -> str:
    """The part of the ledger that a stored tensor belongs to."""
    if name.endswith("_scale"):
        return "scales"
    if name.endswith("_zero"):
        return "zero points"
    if name.endswith("_q"):
        return "codes" if spec.is_dense else "factor codes"
    return "dense numbers" if spec.is_dense else "factors"
