"""What calibration learned about a model's cache, as one folder: ``profile.json`` and ``profile.safetensors``."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Annotated, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from tensornet_compress.bisection import least_kept
from tensornet_compress.coding.cache_quantiser import CLASSES, HALF, Quantiser
from tensornet_compress.coding.fixed_rate import Curve, allocate
from tensornet_compress.coding.stored_basis import StoredBasis
from tensornet_compress.errors import CheckpointError, TensorNetError
from tensornet_compress.files.hashes import check_digests, check_seal, digests, sealed
from tensornet_compress.files.reading import LARGEST_JSON, parse_json, read_tensors, read_text, steady
from tensornet_compress.files.whole import whole_folder, write_tensors
from tensornet_compress.frozen import Frozen, Shared
from tensornet_compress.kv.live.codec import LiveBasis, SideCode
from tensornet_compress.kv.profile.tree import SideTree

VERSION = 1
SIDES = ("key", "value")
DESCRIPTION, TENSORS = "profile.json", "profile.safetensors"
_DTYPES = {"fine": torch.int16, "codes": torch.int8, "frequency": torch.int16, "offset": torch.float16}
_DTYPES |= {"metric_root": torch.float16}
_MOST_CHANNELS = 1 << 16
Count = Annotated[int, Field(ge=0, le=1 << 40)]


class SideSpec(Frozen):
    """The tree of one side as plain data; units are numbered layer by layer, head by head."""

    width: Annotated[int, Field(ge=1)]
    groups: list[list[int]]
    ranks: list[int]
    joined: list[Count]
    root_rank: Count

    @model_validator(mode="after")
    def _make_a_tree(self) -> Self:
        units = sorted(unit for group in self.groups for unit in group)
        if not units or units != list(range(len(units))) or len(units) * self.width > _MOST_CHANNELS:
            raise ValueError(f"groups {str(self.groups)[:80]} must hold each unit 0 .. n - 1 once, n x width being moderate")
        if not len(self.groups) == len(self.ranks) == len(self.joined):
            raise ValueError(f"{len(self.groups)} groups, {len(self.ranks)} ranks and {len(self.joined)} counts of joined")
        for group, rank, joined in zip(self.groups, self.ranks, self.joined):
            if not (1 <= rank <= len(group) * self.width and joined <= rank):
                raise ValueError(f"a group of {len(group)} units has rank {rank}, of which {joined} are joined")
        if self.root_rank not in (0, sum(self.joined)) or (not self.root_rank and any(self.joined)):
            raise ValueError(f"a root of rank {self.root_rank} joins {sum(self.joined)} components")
        return self

    @classmethod
    def of(cls, tree: SideTree) -> SideSpec:
        """That of a tree."""
        ranks = [basis.rank for basis in tree.bases]
        root_rank = tree.root.rank if tree.root else 0
        return cls(width=tree.width, groups=tree.groups, ranks=ranks, joined=tree.joined, root_rank=root_rank)


class ProfileSpec(Frozen):
    """Everything of a profile that is not a tensor."""

    version: int = VERSION
    checksum: str = ""
    model: str = ""
    """Hashes of the files of weights that it was made for, where it lies beside them."""
    layers: list[Count]
    heads: list[Count]
    rotary: Literal["half", "interleaved"] | None
    metric: Literal["fisher", "queries", "euclidean"]
    key: SideSpec
    value: SideSpec
    calibration_tokens: Count
    grouping_bits: dict[str, dict[str, float]]
    hashes: dict[str, str] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _units_are_heads(self) -> Self:
        units = [sum(map(len, side.groups)) for side in (self.key, self.value)]
        if len(self.layers) != len(self.heads) or self.layers != sorted(set(self.layers)) or 0 in self.heads:
            raise ValueError(f"layers {self.layers} and heads {self.heads} do not go together")
        if units != [sum(self.heads)] * 2:
            raise ValueError(f"{units} units of keys and values for {sum(self.heads)} heads")
        return self


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

    def save(self, folder: str | Path, model: str = "") -> None:
        """Write the folder, whole or not at all; other files in it stay. ``model``: hashes of the weights that it is for."""
        tensors = self.tensors()
        with whole_folder(folder, {DESCRIPTION, TENSORS}) as made:
            write_tensors(made / TENSORS, tensors, {}, hashed=False)
            spec = self.spec.model_copy(update={"checksum": "", "hashes": digests(tensors), "model": model})
            text = spec.model_dump_json(indent=1, exclude=None if model else {"model"})
            (made / DESCRIPTION).write_text(sealed(text), encoding="utf-8")

    @staticmethod
    def load(folder: str | Path, verify: bool = True) -> Profile:
        """Read a folder written by ``save``; ``verify``: check the hashes (profiles of older releases have none).

        Raises:
            CheckpointError: files are missing, damaged, of another version, or tensors do not fit the description.
        """
        return steady(Path(folder), partial(_read, verify=verify))


def _read(folder: Path, verify: bool) -> Profile:
    where = repr(str(folder))
    try:
        text = read_text(folder / DESCRIPTION, LARGEST_JSON)
        data = parse_json(text, repr(str(folder / DESCRIPTION)))
        if isinstance(data, dict) and data.get("version") != VERSION:
            raise CheckpointError(f"the profile in {where} has version {data.get('version')}; this package reads {VERSION}")
        if verify and isinstance(data, dict) and ("checksum" in data or data.get("hashes")):
            check_seal(text, repr(str(folder / DESCRIPTION)))
        spec = ProfileSpec.from_json(text)
        stored, _ = read_tensors(folder / TENSORS)
        if verify and spec.hashes:
            check_digests(stored, spec.hashes, repr(str(folder / TENSORS)))
    except TensorNetError as error:
        raise CheckpointError(f"no readable cache profile in {where}: {error}") from error
    spec = spec.model_copy(update={"checksum": "", "hashes": {}})
    try:
        _check_numbers(stored)
        trees = {side: _tree(getattr(spec, side), side, stored) for side in SIDES}
        scale = {side: stored[f"{side}.scale"].view(trees[side].components) for side in SIDES}
        live = {side: _live(spec, getattr(spec, side).width, side, stored) for side in SIDES}
        curve = Curve(stored["curve.error"].view(9), stored["curve.step"].view(9))
        profile = Profile(spec, trees, scale, stored["frequency"], stored["offset"].view(CLASSES, HALF + 1), live, curve)
        # Made here so that what cannot be used is refused here.
        _ = profile.quantiser, *(tree.metric_root_inverse for tree in trees.values())
    except (KeyError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"the profile in {where} lacks or misshapes a tensor: {error}") from error
    extra = sorted(set(stored) - set(profile.tensors()))
    if extra:
        raise CheckpointError(f"the profile in {where} holds tensors its description does not name: {extra[:4]}")
    return profile


def _check_numbers(stored: dict[str, Tensor]) -> None:
    """Refuse dtypes and numbers that no calibration gives."""
    for name, tensor in stored.items():
        part = name.rpartition(".")[2]
        half = part == "scale" and name.count(".") > 1
        wanted = _DTYPES.get(part, torch.float16 if half else torch.float32)
        if tensor.dtype != wanted:
            raise CheckpointError(f"{name!r} is stored as {tensor.dtype}, expected {wanted}")
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise CheckpointError(f"{name!r} holds infinity")
        if part in ("scale", "deviation", "step", "error") and bool((tensor < 0).any()):
            raise CheckpointError(f"{name!r} holds a negative {part}")


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
