"""A reader of saved models written from docs/file-format.md alone: NumPy and JSON, nothing of the package."""

from __future__ import annotations

import json
from math import factorial, prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Tensors = dict[str, Array]


def read_safetensors(path: Path) -> tuple[dict[str, str], Tensors]:
    """Metadata and tensors; bfloat16 becomes float32."""
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    metadata = header.pop("__metadata__", {})
    kinds = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1", "U8": "u1"}
    tensors = {}
    for name, entry in header.items():
        begin, end = (8 + size + offset for offset in entry["data_offsets"])
        if entry["dtype"] == "BF16":
            flat = (np.frombuffer(raw[begin:end], "<u2").astype(np.uint32) << 16).view(np.float32)
        else:
            flat = np.frombuffer(raw[begin:end], kinds[entry["dtype"]])
        tensors[name] = flat.reshape(entry["shape"])
    return metadata, tensors


def unpacked(packed: Array, bits: int, count: int) -> Array:
    """Integers of one little-endian bit stream."""
    stream = np.unpackbits(packed, bitorder="little")[: count * bits].reshape(count, bits)
    return (stream.astype(np.int64) << np.arange(bits)).sum(1)


def permutation(packed: Array, n: int) -> list[int]:
    """A permutation from its Lehmer code."""
    assert len(packed) == ((factorial(n) - 1).bit_length() + 7) // 8
    number, ranks = int.from_bytes(packed.tobytes(), "little"), []
    for base in range(1, n + 1):
        number, rank = divmod(number, base)
        ranks.append(rank)
    left = list(range(n))
    return [left.pop(rank) for rank in reversed(ranks)]


def core(tensors: Tensors, name: str, fmt: dict[str, Any], shape: tuple[int, ...]) -> Array:
    """A decoded core."""
    if fmt["kind"] == "float":
        assert tensors[name].shape == shape
        return tensors[name].astype(np.float32)
    if fmt["kind"] == "pivot":
        chosen = unpacked(tensors[f"{name}_pivots"], 1, shape[0]).astype(bool)
        rows = np.zeros(shape, np.float32)
        rows[chosen], rows[~chosen] = np.eye(shape[1]), tensors[name]
        return rows
    bits, group = fmt["bits"], fmt["group"]
    run = shape[-1] if shape[-1] >= group else prod(shape)
    count = prod(shape) // run
    width = min(group, run) if group else run
    groups = -(-run // width)
    codes = unpacked(tensors[f"{name}_q"], bits, count * run).reshape(count, run)
    which = np.arange(run) // width
    scale = tensors[f"{name}_scale"].astype(np.float32)
    if fmt["zero"] == "float":
        return (scale[:, which] * codes + tensors[f"{name}_zero"].astype(np.float32)[:, which]).reshape(shape)
    zero = np.full((count, groups), 1 << (bits - 1))
    if fmt["zero"] == "int":
        zero = unpacked(tensors[f"{name}_zero"], bits, count * groups).reshape(count, groups)
    return (scale[:, which] * (codes - zero[:, which])).astype(np.float32).reshape(shape)


def core_axes(topology: dict[str, Any], number: int) -> list[str]:
    """Labels of a core's axes."""
    bonds = sorted((a + b - number, bond) for bond, (a, b) in enumerate(topology["edges"]) if number in (a, b))
    lower, higher = ([f"b{bond}" for other, bond in bonds if (other < number) is below] for below in (True, False))
    return [*lower, *(f"p{position}" for position in topology["legs"][number]), *higher]


def term_dense(tensors: Tensors, layer: str, number: int, term: dict[str, Any]) -> Array:
    """The tensor of one term."""
    prefix = f"{layer}.t{number}_" if number else f"{layer}."
    layout, topology = term["layout"], term["topology"]
    shape, radices = layout["tensorization"]["shape"], layout["tensorization"]["radices"]
    modes = [radix for digits in radices for radix in digits]
    sizes = {f"p{p}": modes[mode] for p, mode in enumerate(layout["mode_order"])}
    sizes |= {f"b{bond}": rank for bond, rank in enumerate(term["ranks"])}
    letters = {label: i for i, label in enumerate(sizes)}
    operands: list[Any] = []
    for c, fmt in enumerate(term["formats"]):
        axes = core_axes(topology, c)
        operands += [core(tensors, f"{prefix}core{c}", fmt, tuple(sizes[label] for label in axes)), [letters[a] for a in axes]]
    laid_out = np.einsum(*operands, [letters[f"p{p}"] for p in range(len(modes))])
    dense = laid_out.transpose(np.argsort(layout["mode_order"])).reshape([prod(digits) for digits in radices])
    dense = dense[tuple(slice(size) for size in shape)]
    for order in reversed(layout["fibre_orders"]):
        axis = order["axis"]
        fibres = order["permutation"] or permutation(tensors[f"{prefix}order{axis}"], shape[axis])
        dense = np.take(dense, np.argsort(fibres), axis)
    return dense


def read_model(folder: Path) -> tuple[dict[str, Any], Tensors, dict[str, Array]]:
    """Manifest, stored tensors, and the decoded weight of every layer of the plan."""
    manifest = json.loads((folder / "tensornet.json").read_text(encoding="utf-8"))
    assert manifest["format_version"] == 1
    _, tensors = read_safetensors(folder / "model.safetensors")
    weights = {
        name: sum(term_dense(tensors, name, t, term) for t, term in enumerate(layer["spec"]["terms"]))
        for name, layer in manifest["plan"]["layers"].items()
    }
    return manifest, tensors, weights
