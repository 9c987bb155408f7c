"""What calibration learned about a model's cache, as one folder: ``profile.json`` and ``profile.safetensors``."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from tensornet_compress.coding.entropy import Quantiser
from tensornet_compress.errors import CheckpointError, TensorNetError
from tensornet_compress.frozen import Frozen
from tensornet_compress.kv.live.codec import Curve, LiveBasis, SideCode, allocate
from tensornet_compress.kv.profile.tree import SideTree, StoredBasis

VERSION = 1
SIDES: tuple[Literal["key"], Literal["value"]] = ("key", "value")


class SideSpec(Frozen):
    """The tree of one side as plain data; units are numbered layer by layer, head by head."""

    width: int
    groups: list[list[int]]
    ranks: list[int]
    joined: list[int]
    root_rank: int


class ProfileSpec(Frozen):
    """Everything of a profile that is not a tensor."""

    version: int = VERSION
    layers: list[int]
    heads: list[int]
    rotary: Literal["half", "interleaved"] | None
    metric: Literal["fisher", "queries", "euclidean"]
    key: SideSpec
    value: SideSpec
    calibration_tokens: int
    grouping_bits: dict[str, dict[str, float]]


@dataclass(frozen=True)
class Profile:
    """Bases, metric and statistics of a model's cache.

    ``trees``, ``scale`` (mean magnitude of each coefficient), ``frequency`` and ``offset`` serve storage mode; ``live`` (one
    basis per layer and side) and ``curve`` serve live mode.
    """

    spec: ProfileSpec
    trees: dict[str, SideTree]
    scale: dict[str, Tensor]
    frequency: Tensor
    offset: Tensor
    live: dict[str, list[LiveBasis]]
    curve: Curve
    _codes: dict[float, list[tuple[SideCode, SideCode]]] = field(default_factory=dict, compare=False, repr=False)

    def live_codes(self, bits: float) -> list[tuple[SideCode, SideCode]]:
        """Codes of keys and values of every layer, bits shared out over all layers and both sides; made once per rate."""
        if bits not in self._codes:
            pairs = list(zip(self.live["key"], self.live["value"]))
            chosen = allocate(torch.cat([basis.deviation for pair in pairs for basis in pair]), self.curve, bits)
            parts = iter(chosen.split([len(basis.deviation) for pair in pairs for basis in pair]))
            self._codes[bits] = [
                (SideCode(key, next(parts), self.curve, heads), SideCode(value, next(parts), self.curve, heads))
                for (key, value), heads in zip(pairs, self.spec.heads)
            ]
        return self._codes[bits]

    @property
    def nbytes(self) -> int:
        """Stored bytes of all tensors; the file adds its header and the JSON."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    @property
    def numbers(self) -> int:
        """Numbers in the bases of both sides."""
        live = sum(v.rank * v.width for bases in self.live.values() for b in bases for v in b.blocks)
        return sum(tree.numbers for tree in self.trees.values()) + live

    @property
    def full_basis_numbers(self) -> int:
        """Numbers of the full joined bases that the trees replace."""
        return sum(tree.mean.numel() ** 2 for tree in self.trees.values())

    @cached_property
    def quantiser(self) -> Quantiser:
        """The quantiser with this profile's statistics."""
        return Quantiser(self.frequency, self.offset)

    @property
    def elements_per_token(self) -> int:
        """Keys and values that one token caches."""
        return sum(tree.mean.numel() for tree in self.trees.values())

    def step(self, bits: float) -> float:
        """The quantisation step whose calibrated rate is ``bits`` per element.

        Raises:
            TensorNetError: the rate is outside what steps can reach.
        """
        low, high = 1e-9, 1e9
        if not 0.05 <= bits <= 12:
            raise TensorNetError(f"asked for {bits} bits per element; entropy-coded caches take 0.05 to 12")
        for _ in range(80):
            middle = (low * high) ** 0.5
            rate = sum(self.quantiser.expected_bits(self.scale[side], middle) for side in SIDES)
            low, high = (middle, high) if rate > bits * self.elements_per_token else (low, middle)
        return high

    def tensors(self) -> dict[str, Tensor]:
        """Everything stored, by flat name."""
        out = {"frequency": self.frequency, "offset": self.offset}
        out |= {"curve.error": self.curve.error, "curve.step": self.curve.step}
        for side, live in self.live.items():
            for i, own in enumerate(live):
                out |= {f"{side}.live{i}.{name}": part for name, part in own.blocks[0].tensors().items()}
                out |= {f"{side}.live{i}.deviation": own.deviation, f"{side}.live{i}.mean": own.mean}
        for side, tree in self.trees.items():
            out |= {
                f"{side}.mean": tree.mean,
                f"{side}.metric_root": tree.metric_root,
                f"{side}.scale": self.scale[side],
            }
            bases = {f"{side}.group{i}": basis for i, basis in enumerate(tree.bases)}
            if tree.root is not None:
                bases[f"{side}.root"] = tree.root
            for name, basis in bases.items():
                out |= {f"{name}.{part}": tensor for part, tensor in basis.tensors().items()}
        return out

    def save(self, folder: str | Path) -> None:
        """Write the folder; each file appears whole or not at all."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".profile.") as temporary:
            save_file(self.tensors(), Path(temporary) / "profile.safetensors")
            (Path(temporary) / "profile.json").write_text(self.spec.to_json(indent=1))
            for name in ("profile.safetensors", "profile.json"):
                os.replace(Path(temporary) / name, folder / name)

    @staticmethod
    def load(folder: str | Path) -> Profile:
        """Read a folder written by ``save``.

        Raises:
            CheckpointError: files are missing, damaged, of another version, or tensors do not fit the description.
        """
        folder = Path(folder)
        try:
            spec = ProfileSpec.from_json((folder / "profile.json").read_text())
            stored = load_file(folder / "profile.safetensors")
        except (OSError, SafetensorError, TensorNetError) as error:
            raise CheckpointError(f"no readable cache profile in {str(folder)!r}: {error}") from error
        if spec.version != VERSION:
            raise CheckpointError(f"the profile in {str(folder)!r} has version {spec.version}; this package reads {VERSION}")
        try:
            trees: dict[str, SideTree] = {side: _tree(getattr(spec, side), side, stored) for side in SIDES}
            scale: dict[str, Tensor] = {side: stored[f"{side}.scale"] for side in SIDES}
            live: dict[str, list[LiveBasis]] = {side: _live(spec, getattr(spec, side).width, side, stored) for side in SIDES}
            curve = Curve(stored["curve.error"].view(9), stored["curve.step"].view(9))
            profile = Profile(spec, trees, scale, stored["frequency"], stored["offset"], live, curve)
        except (KeyError, RuntimeError) as error:
            raise CheckpointError(f"the profile in {str(folder)!r} lacks or misshapes a tensor: {error}") from error
        if set(profile.tensors()) != set(stored):
            extra = sorted(set(stored) - set(profile.tensors()))
            raise CheckpointError(f"the profile in {str(folder)!r} holds tensors its description does not name: {extra[:4]}")
        for side in SIDES:
            if scale[side].shape != (trees[side].components,):
                raise CheckpointError(f"the profile in {str(folder)!r} has {tuple(scale[side].shape)} {side} scales")
        return profile


def stored_basis(stored: dict[str, Tensor], name: str, rank: int, width: int) -> StoredBasis:
    """The basis stored as ``name``, of the shape it must have (``RuntimeError`` or ``KeyError`` otherwise)."""
    scale = stored[f"{name}.scale"].view(rank)
    fine, codes = (stored[f"{name}.{part}"].view(-1, width) for part in ("fine", "codes"))
    if len(fine) + len(codes) != rank:
        raise RuntimeError(f"{name} has {len(fine)} + {len(codes)} rows, not {rank}")
    return StoredBasis(fine, codes, scale)


def _tree(spec: SideSpec, side: str, stored: dict[str, Tensor]) -> SideTree:
    units = sum(len(group) for group in spec.groups)

    def basis(name: str, rank: int, width: int) -> StoredBasis:
        return stored_basis(stored, name, rank, width)

    bases = [
        basis(f"{side}.group{i}", rank, len(group) * spec.width) for i, (group, rank) in enumerate(zip(spec.groups, spec.ranks))
    ]
    root = basis(f"{side}.root", spec.root_rank, sum(spec.joined)) if spec.root_rank else None
    mean = stored[f"{side}.mean"].view(units * spec.width)
    metric_root = stored[f"{side}.metric_root"].view(units, spec.width, spec.width)
    return SideTree(spec.width, mean, metric_root, spec.groups, bases, spec.joined, root)


def _live(spec: ProfileSpec, width: int, side: str, stored: dict[str, Tensor]) -> list[LiveBasis]:
    bases = []
    for i, heads in enumerate(spec.heads):
        n, name = heads * width, f"{side}.live{i}"
        vectors = stored_basis(stored, name, n, n)
        bases.append(LiveBasis((vectors,), stored[f"{name}.deviation"].view(n), stored[f"{name}.mean"].view(n)))
    return bases


def side_spec(tree: SideTree) -> SideSpec:
    """The plain-data part of a tree."""
    return SideSpec(
        width=tree.width,
        groups=tree.groups,
        ranks=[basis.rank for basis in tree.bases],
        joined=tree.joined,
        root_rank=tree.root.rank if tree.root else 0,
    )


def check_finite(name: str, tensor: Tensor) -> Tensor:
    """``tensor`` unless it holds NaN or infinity, which is an error naming it."""
    if not torch.isfinite(tensor).all():
        raise TensorNetError(f"calibration gave NaN or infinity in {name}; check the model's dtype and the batches")
    return tensor
