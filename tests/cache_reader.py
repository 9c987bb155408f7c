"""A reader of KV profiles and saved caches written from docs/file-format.md alone: NumPy and JSON, nothing of the package."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.file_reader import Tensors, rans, read_safetensors

Array = NDArray[Any]
SIDES = ("key", "value")
FIELDS = {0: (), 1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 8: (4, 4)}


def basis(tensors: Tensors, name: str) -> Array:
    """A stored basis, vectors as rows."""
    parts = [tensors[f"{name}.fine"].astype(np.float64), tensors[f"{name}.codes"].astype(np.float64)]
    return np.concatenate(parts) * tensors[f"{name}.scale"].astype(np.float64)[:, None]


class Profile:
    """A profile folder."""

    def __init__(self, folder: Path):
        self.spec = json.loads((folder / "profile.json").read_text(encoding="utf-8"))
        assert self.spec["version"] == 1
        self.tensors = read_safetensors(folder / "profile.safetensors")[1]

    def fingerprint(self) -> str:
        """SHA-256 over names and tensors."""
        digest = hashlib.sha256()
        for name in sorted(self.tensors):
            digest.update(name.encode() + self.tensors[name].tobytes())
        return digest.hexdigest()

    def states(self, side: str, coefficients: Array) -> Array:
        """Coefficients of a side's tree (tokens, components) -> states (tokens, channels)."""
        tree, width = self.spec[side], self.spec[side]["width"]
        counts, joined = tree["ranks"], tree["joined"]
        if tree["root_rank"]:
            top = coefficients[:, : tree["root_rank"]] @ basis(self.tensors, f"{side}.root")
            leading = np.split(top, np.cumsum(joined)[:-1], 1)
            rest = [count - lead for count, lead in zip(counts, joined)]
            others = np.split(coefficients[:, tree["root_rank"] :], np.cumsum(rest)[:-1], 1)
            parts = [np.concatenate(pair, 1) for pair in zip(leading, others)]
        else:
            parts = np.split(coefficients, np.cumsum(counts)[:-1], 1)
        states = np.zeros((len(coefficients), self.tensors[f"{side}.mean"].size))
        for number, (units, part) in enumerate(zip(tree["groups"], parts)):
            channels = part @ basis(self.tensors, f"{side}.group{number}")
            for place, unit in enumerate(units):
                inverse = np.linalg.inv(self.tensors[f"{side}.metric_root"][unit].astype(np.float64))
                found = channels[:, place * width : (place + 1) * width] @ inverse
                states[:, unit * width : (unit + 1) * width] = found
        return states + self.tensors[f"{side}.mean"]

    def bits(self, rate: float) -> list[dict[str, Array]]:
        """Bits of every component of a live cache, by layer and side."""
        names = [f"{side}.live{i}.deviation" for i in range(len(self.spec["layers"])) for side in SIDES]
        variance = np.concatenate([self.tensors[name].astype(np.float64) ** 2 for name in names])
        allowed = np.array(sorted(FIELDS))
        error = variance[:, None] * self.tensors["curve.error"][allowed].astype(np.float64)
        low, high = 1e-30, 4 * variance.max()
        for _ in range(120):
            price = (low * high) ** 0.5
            mean = allowed[(error + price * allowed).argmin(1)].mean()
            low, high = (price, high) if mean > rate else (low, price)
        choice = (error + high * allowed).argmin(1)
        left = int(rate * len(variance)) - int(allowed[choice].sum())
        upper = np.minimum(choice + 1, len(allowed) - 1)
        gain = np.take_along_axis(error, choice[:, None], 1) - np.take_along_axis(error, upper[:, None], 1)
        for component in np.argsort(-gain[:, 0], kind="stable"):
            more = allowed[upper[component]] - allowed[choice[component]]
            if 0 < more <= left:
                choice[component], left = upper[component], left - more
        parts = np.split(allowed[choice], np.cumsum([self.tensors[name].size for name in names])[:-1])
        return [dict(zip(SIDES, parts[i : i + 2])) for i in range(0, len(parts), 2)]


class Cache:
    """A saved cache and the profile it was coded with."""

    def __init__(self, path: Path, profile: Profile):
        metadata, self.tensors = read_safetensors(path)
        self.record, self.profile = json.loads(metadata["tensornet_compress_kv"]), profile
        assert self.record["version"] == 1
        assert self.record["profile"] == profile.fingerprint()

    def live(self, layer: int, side: str) -> Array:
        """Coded states of one layer of a live cache: (batch, tokens, heads * width), rotation on."""
        bits = self.profile.bits(self.record["bits"])[layer][side]
        stored = self.profile.tensors
        rows: dict[int, list[tuple[int, int]]] = {width: [] for width in (4, 2, 1)}
        for component, count in enumerate(bits):
            below = int(count)
            for width in FIELDS[int(count)]:
                below -= width
                rows[width].append((component, below))
        codes: Array | None = None
        for width, found in rows.items():
            packed = self.tensors[f"codes{layer}.{side}s.{width}"]
            assert packed.shape[1] == len(found)
            assert packed.shape[3] == 8 * width
            lanes = [(packed >> (width * lane)) & ((1 << width) - 1) for lane in range(8 // width)]
            values = np.concatenate(lanes, 3).reshape(*packed.shape[:2], 64 * packed.shape[2]).astype(np.int64)
            codes = np.zeros((len(packed), len(bits), values.shape[2]), np.int64) if codes is None else codes
            for row, (component, place) in enumerate(found):
                codes[:, component] += values[:, row] << place
        assert codes is not None
        step = stored[f"{side}.live{layer}.deviation"] * stored["curve.step"][bits]
        scaled = np.where(bits > 0, 1, 0)[:, None] * (codes - ((1 << bits) // 2)[:, None] + 0.5) * step[:, None]
        return scaled.transpose(0, 2, 1) @ basis(stored, f"{side}.live{layer}") + stored[f"{side}.live{layer}.mean"]

    def payload(self, number: int, tokens: int) -> dict[str, Array]:
        """Coded states of a storage payload by side: (tokens, channels), rotation off."""
        stored = self.profile.tensors
        scale = np.concatenate([stored[f"{side}.scale"] for side in SIDES]).astype(np.float64)
        step = float(self.tensors[f"payload{number}.step"][0])
        octave = np.log2(np.maximum(scale / step, 1e-30))
        coded = np.flatnonzero(octave > -6)
        octave = octave[coded]
        shift = np.clip(np.ceil(octave - 2), 0, 6).astype(np.int64)
        table = np.clip(np.round(4 * (octave - shift + 6)), 0, 32).astype(np.int64)
        shifted = np.flatnonzero(shift)
        frequency = np.zeros((39, 64), np.int64)
        frequency[:33] = stored["frequency"]
        for k in range(1, 7):
            frequency[32 + k, : 1 << k] = 4096 >> k
        stream = rans(self.tensors[f"payload{number}.coded"], np.tile([*table, *(32 + shift[shifted])], tokens), frequency)
        symbols, low = np.split(stream.reshape(tokens, -1), [len(coded)], 1)
        codes = symbols - 31
        codes[symbols == 63] = self.tensors[f"payload{number}.escaped"]
        inside = np.abs(codes) <= 31
        offset = stored["offset"].astype(np.float64)[table, np.minimum(np.abs(codes), 31)]
        values = codes + np.where(inside, np.sign(codes) * offset, 0)
        k = shift[shifted]
        values[:, shifted] = (codes[:, shifted] << k) + low - (1 << (k - 1))
        coefficients = np.zeros((tokens, len(scale)))
        coefficients[:, coded] = values * step
        parts = np.split(coefficients, [stored["key.scale"].size], 1)
        return {side: self.profile.states(side, part) for side, part in zip(SIDES, parts)}
