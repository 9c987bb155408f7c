"""What calibration learned about a model's cache, as one folder: ``profile.json`` and ``profile.safetensors``."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from tensornet_compress.bisection import least_kept
from tensornet_compress.coding.cache_quantiser import Quantiser
from tensornet_compress.coding.fixed_rate import Curve, allocate
from tensornet_compress.coding.stored_basis import StoredBasis
from tensornet_compress.errors import CheckpointError, TensorNetError
from tensornet_compress.files.whole import read_tensors, whole_file, write_tensors
from tensornet_compress.frozen import Frozen, Shared
from tensornet_compress.kv.live.codec import LiveBasis, SideCode
from tensornet_compress.kv.profile.tree import SideTree

VERSION = 1
SIDES = ("key", "value")


class SideSpec(Frozen):
    """The tree of one side as plain data; units are numbered layer by layer, head by head."""

    width: int
    groups: list[list[int]]
    ranks: list[int]
    joined: list[int]
    root_rank: int

    @classmethod
    def of(cls, tree: SideTree) -> SideSpec:
        """That of a tree."""
        ranks = [basis.rank for basis in tree.bases]
        root_rank = tree.root.rank if tree.root else 0
        return cls(width=tree.width, groups=tree.groups, ranks=ranks, joined=tree.joined, root_rank=root_rank)


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
class Profile(Shared):
    """Bases, metric and statistics of a model's cache, made by ``calibrate``.

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
        if not 0.05 <= bits <= 12:
            raise TensorNetError(f"asked for {bits} bits per element; entropy-coded caches take 0.05 to 12")

        def fits(step: float) -> bool:
            rate = sum(self.quantiser.expected_bits(self.scale[side], step) for side in SIDES)
            return rate <= bits * self.elements_per_token

        return least_kept(fits, 1e-9, 1e9, steps=80)

    def tensors(self) -> dict[str, Tensor]:
        """Everything stored, by flat name."""
        out = {"frequency": self.frequency, "offset": self.offset}
        out |= {"curve.error": self.curve.error, "curve.step": self.curve.step}
        for side, tree in self.trees.items():
            out |= {f"{side}.mean": tree.mean, f"{side}.metric_root": tree.metric_root, f"{side}.scale": self.scale[side]}
            bases = {f"{side}.group{i}": basis for i, basis in enumerate(tree.bases)}
            if tree.root is not None:
                bases[f"{side}.root"] = tree.root
            for i, live in enumerate(self.live[side]):
                bases[f"{side}.live{i}"] = live.blocks[0]
                out |= {f"{side}.live{i}.deviation": live.deviation, f"{side}.live{i}.mean": live.mean}
            for name, basis in bases.items():
                out |= {f"{name}.{part}": tensor for part, tensor in basis.tensors().items()}
        return out

    def fingerprint(self) -> str:
        """Hash of all tensors: a cache file only opens with the profile that it was coded with."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.tensors().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def save(self, folder: str | Path) -> None:
        """Write the folder; each file appears whole or not at all."""
        write_tensors(Path(folder) / "profile.safetensors", self.tensors(), {})
        with whole_file(Path(folder) / "profile.json") as file:
            file.write_text(self.spec.to_json(indent=1))

    @staticmethod
    def load(folder: str | Path) -> Profile:
        """Read a folder written by ``save``.

        Raises:
            CheckpointError: files are missing, damaged, of another version, or tensors do not fit the description.
        """
        where = repr(str(folder))
        try:
            spec = ProfileSpec.from_json((Path(folder) / "profile.json").read_text())
            stored, _ = read_tensors(Path(folder) / "profile.safetensors")
        except (OSError, TensorNetError) as error:
            raise CheckpointError(f"no readable cache profile in {where}: {error}") from error
        if spec.version != VERSION:
            raise CheckpointError(f"the profile in {where} has version {spec.version}; this package reads {VERSION}")
        try:
            trees = {side: _tree(getattr(spec, side), side, stored) for side in SIDES}
            scale = {side: stored[f"{side}.scale"].view(trees[side].components) for side in SIDES}
            live = {side: _live(spec, getattr(spec, side).width, side, stored) for side in SIDES}
            curve = Curve(stored["curve.error"].view(9), stored["curve.step"].view(9))
            profile = Profile(spec, trees, scale, stored["frequency"], stored["offset"], live, curve)
        except (KeyError, RuntimeError) as error:
            raise CheckpointError(f"the profile in {where} lacks or misshapes a tensor: {error}") from error
        extra = sorted(set(stored) - set(profile.tensors()))
        if extra:
            raise CheckpointError(f"the profile in {where} holds tensors its description does not name: {extra[:4]}")
        return profile


def _tree(spec: SideSpec, side: str, stored: dict[str, Tensor]) -> SideTree:
    units = sum(len(group) for group in spec.groups)
    bases = [
        StoredBasis.read(stored, f"{side}.group{i}", rank, len(group) * spec.width)
        for i, (group, rank) in enumerate(zip(spec.groups, spec.ranks))
    ]
    root = StoredBasis.read(stored, f"{side}.root", spec.root_rank, sum(spec.joined)) if spec.root_rank else None
    mean = stored[f"{side}.mean"].view(units * spec.width)
    metric_root = stored[f"{side}.metric_root"].view(units, spec.width, spec.width)
    return SideTree(spec.width, mean, metric_root, spec.groups, bases, spec.joined, root)


def _live(spec: ProfileSpec, width: int, side: str, stored: dict[str, Tensor]) -> list[LiveBasis]:
    bases = []
    for i, heads in enumerate(spec.heads):
        n, name = heads * width, f"{side}.live{i}"
        vectors = StoredBasis.read(stored, name, n, n)
        bases.append(LiveBasis((vectors,), stored[f"{name}.deviation"].view(n), stored[f"{name}.mean"].view(n)))
    return bases
