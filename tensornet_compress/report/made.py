"""A result of what has just been measured here: machine, version, time, and the networks that were made as drawings."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from pydantic import JsonValue

from tensornet_compress.report.schema import Drawing, Machine, Measure, Result, Row
from tensornet_compress.tensor import NetworkSpec
from tensornet_compress.version import __version__

PACKAGES = (
    *("torch", "tensorly", "opt_einsum", "transformers", "numpy", "scipy", "safetensors"),
    *("optimum-quanto", "hqq", "tensorly-torch", "teneva", "ttnopt"),
)


def made_here(
    name: str,
    command: str,
    measures: Mapping[str, Measure],
    rows: Iterable[Row],
    settings: Mapping[str, JsonValue] | None = None,
    seconds: float | None = None,
) -> Result:
    """The result of ``rows``, with those of ``measures`` that they use."""
    kept = tuple(rows)
    used = {value for row in kept for value in row.values}
    return Result(
        name=name,
        command=command,
        version=__version__,
        made=datetime.now(UTC).isoformat(timespec="seconds"),
        machine=this_machine(),
        settings=dict(settings or {}),
        measures={measure: meaning for measure, meaning in measures.items() if measure in used},
        rows=kept,
        seconds=seconds,
    )


def this_machine() -> Machine:
    """The machine and the versions of what is measured; a package that is not installed is left out."""
    packages = {}
    for name in PACKAGES:
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            continue
    return Machine(
        processor=_processor(),
        cores=os.cpu_count() or 1,
        threads=torch.get_num_threads(),
        python=platform.python_version(),
        packages=packages,
        commit=_commit(),
    )


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _commit() -> str | None:
    """The commit of the source tree, when the package lies in one."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    try:
        told = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=root, check=False)
    except OSError:
        return None
    return told.stdout.strip() or None


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


def drawings_of(specs: Mapping[str, NetworkSpec], most: int = 4) -> tuple[Drawing, ...]:
    """The kinds of networks that a model uses most, structured ones first, each by its first layer."""
    kinds: dict[tuple[object, ...], list[str]] = {}
    for name, spec in specs.items():
        kind = () if spec.is_dense else tuple((term.topology, term.layout.dims) for term in spec.terms)
        kinds.setdefault(kind, []).append(name)
    drawings = []
    for names in sorted(kinds.values(), key=lambda names: (specs[names[0]].is_dense, -len(names)))[:most]:
        alike = "dense ones" if specs[names[0]].is_dense else "like it"
        more = f" and {len(names) - 1} more {alike}" if len(names) > 1 else ""
        drawings.append(drawing_of(f"{names[0]}{more}", specs[names[0]]))
    return tuple(drawings)
