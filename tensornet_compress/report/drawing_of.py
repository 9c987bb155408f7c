"""Networks as drawings."""

from __future__ import annotations

from collections.abc import Mapping

from tensornet_compress.report.schema import Drawing
from tensornet_compress.tensor import NetworkSpec


def drawing_of(title: str, spec: NetworkSpec) -> Drawing:
    """The networks of a sum, side by side. Legs are named by axis (``out``, ``in`` for matrices) with size."""
    names = ("out", "in") if len(spec.shape) == 2 else tuple(f"axis {axis}" for axis in range(len(spec.shape)))
    legs: list[tuple[str, ...]] = []
    edges: list[tuple[int, int, int]] = []
    for term in spec.terms:
        start = len(legs)
        axes, dims = term.layout.position_axes, term.layout.dims
        legs += [tuple(f"{names[axes[p]]}: {dims[p]}" for p in core) for core in term.topology.legs]
        edges += [(start + a, start + b, rank) for (a, b), rank in zip(term.topology.edges, term.ranks)]
    return Drawing(title=title, legs=tuple(legs), edges=tuple(edges))


def kinds_of(specs: Mapping[str, NetworkSpec], most: int = 4) -> tuple[Drawing, ...]:
    """The kinds of networks that a model uses most, structured ones first, each by its first layer."""
    kinds: dict[tuple[object, ...], list[str]] = {}
    for name, spec in specs.items():
        kind = () if spec.is_dense else tuple((term.topology, term.layout.dims) for term in spec.terms)
        kinds.setdefault(kind, []).append(name)
    chosen = sorted(kinds.values(), key=lambda names: (specs[names[0]].is_dense, -len(names)))[:most]
    found = []
    for names in chosen:
        more = (
            "" if len(names) == 1 else f" and {len(names) - 1} more {'dense ones' if specs[names[0]].is_dense else 'like it'}"
        )
        found.append(drawing_of(f"{names[0]}{more}", specs[names[0]]))
    return tuple(found)
