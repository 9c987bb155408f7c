"""The byte ledger of a saved folder: every byte on disk belongs to a row."""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import Any

from tensornet_compress.coding import EntropyCoded
from tensornet_compress.errors import CheckpointError
from tensornet_compress.files import TENSORS, read_manifest
from tensornet_compress.files.reading import tensor_nbytes
from tensornet_compress.files.shards import open_folder, tensor_files
from tensornet_compress.frozen import Frozen
from tensornet_compress.tensor import NetworkSpec, expected_tensors
from tensornet_compress.tensor.network import part_name


class LedgerRow(Frozen):
    """One layer, or all layers of a kind: stored bytes (bias included) and those that it takes in memory, weights, squared
    relative error in the metric."""

    name: str
    network: str
    family: str = ""
    nbytes: int
    resident_nbytes: int
    weights: int
    error: float | None
    share: float

    @property
    def bits_per_weight(self) -> float:
        """8 x stored bytes / weights."""
        return 8 * self.nbytes / self.weights


class Ledger(Frozen):
    """Bytes of a folder. ``other_tensors`` are tensors outside the compressed layers; ``header`` is the safetensors header."""

    layers: tuple[LedgerRow, ...]
    other_tensors: dict[str, int]
    header: int
    files: dict[str, int]

    def totals(self) -> dict[str, int]:
        """Rows that add up to ``folder``."""
        parts = {
            "compressed layers": sum(row.nbytes for row in self.layers),
            "other tensors": sum(self.other_tensors.values()),
            "safetensors header": self.header,
            **{f"file {name}": size for name, size in self.files.items()},
        }
        return parts | {"folder": sum(parts.values())}

    def by_kind(self) -> list[LedgerRow]:
        """Layers summed by the last part of their names."""
        groups: dict[str, list[LedgerRow]] = {}
        for row in self.layers:
            groups.setdefault(row.name.rsplit(".", 1)[-1], []).append(row)
        return [
            LedgerRow(
                name=f"{name} x {len(rows)}",
                network=", ".join(sorted({f"{row.family} {row.network.split(' ')[-1]}".strip() for row in rows})),
                nbytes=sum(row.nbytes for row in rows),
                resident_nbytes=sum(row.resident_nbytes for row in rows),
                weights=sum(row.weights for row in rows),
                error=sum(row.error or 0.0 for row in rows) / len(rows) if rows[0].error is not None else None,
                share=sum(row.share for row in rows),
            )
            for name, rows in groups.items()
        ]


def folder_ledger(folder: str | Path) -> Ledger:
    """Read the ledger of a saved folder from its files (tensor bytes from the safetensors header, not from the manifest)."""
    folder = Path(folder)
    manifest = read_manifest(folder)
    places = tensor_files(folder)
    stored = {name: nbytes for place in places or [folder / TENSORS] for name, nbytes in tensor_nbytes(place).items()}
    total = sum(stored.values())
    rows = []
    layers = manifest.plan.layers
    names_of = {
        name: [f"{name}.{part}" for part in (*expected_tensors(layer.spec), *(["bias"] if layer.bias else []))]
        for name, layer in layers.items()
    }
    if missing := [part for names in names_of.values() for part in names if part not in stored | manifest.shared]:
        raise CheckpointError(f"{str(folder / TENSORS)!r} lacks {missing[0]!r}, which the manifest names")
    with open_folder(folder) as file:
        decoded = {name: _decoded_nbytes(name, layer.spec, file) for name, layer in layers.items()}
    for name, layer in layers.items():
        names = [part for part in names_of[name] if part in stored]
        nbytes = sum(stored.pop(part) for part in names)
        entry = manifest.layers.get(name)
        rows.append(
            LedgerRow(
                name=name,
                network=layer.spec.describe(),
                family=(entry and entry.family) or "",
                nbytes=nbytes,
                resident_nbytes=nbytes + decoded[name],
                weights=prod(layer.spec.shape),
                error=None if entry is None else entry.error,
                share=nbytes / max(total, 1),
            )
        )
    header = sum(place.stat().st_size for place in places) - total
    files = {str(p.relative_to(folder)): p.stat().st_size for p in sorted(folder.rglob("*")) if p.is_file() and p not in places}
    return Ledger(layers=tuple(rows), other_tensors=stored, header=header, files=files)


def _decoded_nbytes(name: str, spec: NetworkSpec, file: Any) -> int:
    """Bytes that a loaded layer holds beside its stored parts: what its entropy-coded cores are decoded to."""
    held = 0
    for t, term in enumerate(spec.terms):
        for core, fmt in enumerate(term.formats):
            if isinstance(fmt, EntropyCoded):
                parts = {fmt.coded_part: file.get_tensor(f"{name}.{part_name(t, core)}{fmt.coded_part}")}
                held += sum(part.nbytes for part in fmt.resident(parts, term.core_shape(core)).values())
    return held
