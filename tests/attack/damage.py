"""Damage to files, seeded: flipped bits, cut ends, wrong JSON, tensors that do not fit; with old hashes or with forged ones."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from tensornet_compress.files.hashes import HASHES, digests, file_digest, header_digest, sealed

NASTY: tuple[Any, ...] = (
    None, -1, 0, 1, 7, 10**7, 2**31, 2**63, 2**64, 1e308, -0.5, "", "x" * 5000, "../../etc/passwd", [], {}, True, False, [[]],
    [-1, 4097, 0], [0, 0], {"a": 1}, "int4g64", "\u0000", 1e-320, "nan",
)  # fmt: skip
Damage = Callable[[Path, Random], str]


def pieces(place: Path) -> list[Path]:
    """The files of a victim."""
    return sorted(path for path in place.rglob("*") if path.is_file()) if place.is_dir() else [place]


def flip(path: Path, chance: Random) -> str:
    """One bit, half of the time in what is likely a header."""
    data = bytearray(path.read_bytes())
    at = chance.randrange(min(len(data), 4096) if chance.random() < 0.5 else len(data))
    data[at] ^= 1 << chance.randrange(8)
    path.write_bytes(data)
    return f"a bit of byte {at}"


def cut(path: Path, chance: Random) -> str:
    data = path.read_bytes()
    end = chance.randrange(len(data))
    path.write_bytes(data[:end])
    return f"cut at {end} of {len(data)}"


def zero_end(path: Path, chance: Random) -> str:
    data = path.read_bytes()
    end = int(len(data) * chance.uniform(0.5, 0.99))
    path.write_bytes(data[:end] + bytes(len(data) - end))
    return f"zeros from {end} on"


def scribble(path: Path, chance: Random) -> str:
    data = bytearray(path.read_bytes())
    at = chance.randrange(len(data))
    data[at : at + 16] = chance.randbytes(len(data[at : at + 16]))
    path.write_bytes(data)
    return f"16 bytes at {at}"


def lose(path: Path, chance: Random) -> str:
    path.unlink()
    return "lost"


RAW: tuple[Damage, ...] = (flip, flip, flip, cut, zero_end, scribble, lose)


def wrong_json(data: Any, chance: Random) -> str:
    """Change one place of JSON data in place; says what."""
    places: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        for key in list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ():
            places.append((node, key))
            walk(node[key])

    walk(data)
    if not places:
        return "nothing to change"
    node, key = chance.choice(places)
    way = chance.randrange(6)
    if way == 0:
        del node[key]
        return f"without {key!r}"
    if way == 1 and isinstance(node, list):
        node.extend(node[key : key + 1] * chance.choice((1, 2, 300)))
        return f"more of {key!r}"
    if way == 2 and isinstance(node, dict):
        node[chance.choice(("extra", "version", ""))] = chance.choice(NASTY)
        return "one more name"
    if way == 3 and isinstance(node[key], (int, float)) and not isinstance(node[key], bool):
        node[key] = chance.choice((-node[key] - 1, node[key] + 1, node[key] * 10**6, node[key] / 3))
        return f"{key!r} is {node[key]!r}"
    node[key] = chance.choice(NASTY)
    return f"{key!r} is {str(node[key])[:40]!r}"


def wrong_tensor(tensors: dict[str, Tensor], chance: Random) -> str:
    """Change one tensor."""
    name = chance.choice(sorted(tensors))
    tensor = tensors[name]
    way = chance.randrange(8)
    if way == 0 or not tensor.numel():
        del tensors[name]
    elif way == 1:
        tensors[name] = tensor.reshape(-1)[: chance.randrange(tensor.numel() + 1)].clone()
    elif way == 2:
        tensors[name] = tensor.to(chance.choice((torch.int64, torch.float64, torch.uint8, torch.float16, torch.bool)))
    elif way == 3 and tensor.is_floating_point():
        tensors[name] = tensor.clone()
        tensors[name].view(-1)[chance.randrange(tensor.numel())] = chance.choice((float("nan"), float("inf"), 0.0, -1e38))
    elif way == 4:
        tensors[name] = torch.zeros_like(tensor)
    elif way == 5:
        tensors["extra"] = tensor.clone()
    else:
        data = tensor.contiguous().reshape(-1).view(torch.uint8).clone()
        data[chance.randrange(len(data))] = chance.randrange(256)
        tensors[name] = data.view(tensor.dtype).view(tensor.shape)
    return f"tensor {name!r}, way {way}"


def forge(place: Path, chance: Random) -> str:
    """Change JSON or a tensor as somebody would who knows the format, and put the hashes right again, or leave them all out."""
    path = chance.choice([p for p in pieces(place) if p.suffix in (".json", ".safetensors")] or [place])
    honest = chance.random() < 0.7
    if (path.suffix == ".json" and path.name in ("tensornet.json", "profile.json", "config.json")) or _is_json(path):
        data = json.loads(path.read_text())
        told = wrong_json(data, chance)
        path.write_text(json.dumps(data, allow_nan=True))
    elif _is_tensors(path):
        told = _forged_tensors(path, chance, honest)
    else:
        return flip(path, chance)
    for manifest in [p for p in pieces(place) if p.suffix == ".json"]:
        _put_right(manifest, honest)
    return f"forged: {path.name}: {told}{'' if honest else ', no hashes'}"


def _forged_tensors(path: Path, chance: Random, honest: bool) -> str:
    with safe_open(path, "pt") as file:
        texts, tensors = file.metadata() or {}, {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    alone = HASHES in texts
    texts.pop(HASHES, None)
    inside = [name for name, text in texts.items() if text.startswith("{")]
    if inside and chance.random() < 0.6:
        name = chance.choice(inside)
        data = json.loads(texts[name])
        told = wrong_json(data, chance)
        texts[name] = json.dumps(data)
    else:
        told = wrong_tensor(tensors, chance)
    if alone and honest:
        texts[HASHES] = json.dumps({"header": header_digest(texts), "tensors": digests(tensors)})
    save_file(tensors, path, texts or None)
    return told


def _put_right(manifest: Path, honest: bool) -> None:
    try:
        data = json.loads(manifest.read_text())
        beside = manifest.with_name("model.safetensors" if manifest.name == "tensornet.json" else "profile.safetensors")
        if "checksum" not in data:
            return
        data["checksum"] = ""
        if isinstance(data.get("hashes"), dict) and _is_tensors(beside):
            with safe_open(beside, "pt") as file:
                data["hashes"] = digests({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
        if isinstance(data.get("files"), dict):
            data["files"] = {n: file_digest(manifest.with_name(n)) for n in data["files"] if manifest.with_name(n).is_file()}
        if not honest:
            data = {name: value for name, value in data.items() if name not in ("checksum", "hashes", "files")}
        text = json.dumps(data)
        manifest.write_text(sealed(text) if honest else text)
    except (ValueError, TypeError):
        return


def _is_json(path: Path) -> bool:
    return path.read_bytes()[:1] == b"{"


def _is_tensors(path: Path) -> bool:
    try:
        with safe_open(path, "pt"):
            return True
    except Exception:
        return False
