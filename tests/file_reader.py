"""A reader of saved models written from docs/file-format.md alone: NumPy, JSON and xxhash, nothing of the package."""

from __future__ import annotations

import itertools
import json
import re
from functools import cache
from math import factorial, prod, sqrt
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from xxhash import xxh3_128

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


def rans(coded: Array, table: Array, frequency: Array, lanes: int = 0) -> Array:
    """Symbols of an entropy-coded stream, one lane at a time."""
    lanes = lanes or int(np.clip(len(table) // 2048, 1, 4096))
    states = [int(state) for state in coded[: 4 * lanes].copy().view("<u4")]
    words = iter(coded[4 * lanes :].copy().view("<u2"))
    start = np.cumsum(frequency, 1) - frequency
    symbol_of = [np.repeat(np.arange(row.size), row) for row in frequency]
    out = np.zeros(len(table), np.int64)
    for i, which in enumerate(table):
        lane = i % lanes
        slot = states[lane] % 4096
        symbol = symbol_of[which][slot]
        state = int(frequency[which, symbol]) * (states[lane] // 4096) + slot - int(start[which, symbol])
        states[lane] = 65536 * state + int(next(words)) if state < 65536 else state
        out[i] = symbol
    assert next(words, None) is None
    return out


@cache
def law(number: int, odd: bool = False) -> Array:
    """Frequencies of a law of coded integers, or of the odd levels of a trellis."""
    p, w = ((0.5, 0.080075502), (0.75, 0.364078299), (1, 0.693147181), (1.5, 1.187677797), (2, 1.475664627))[number // 33]
    root = sqrt(sqrt(2.0))
    eighth = number % 33 - 24
    w *= 2.0 ** (eighth // 4) * (1.0, root, root * root, root * root * root)[eighth % 4]

    def raised(x: float) -> float:
        return {0.5: sqrt(x), 0.75: sqrt(x) * sqrt(sqrt(x)), 1: x, 1.5: x * sqrt(x), 2: x * x}[p]

    def weight(x: float) -> int:
        whole, fraction = divmod(int(min(raised(abs(x) / w), 60.0) * 4096), 4096)
        power, part = 1.0, 0.5
        for bit in range(11, -1, -1):
            part = sqrt(part)
            power = power * part if fraction >> bit & 1 else power
        return int(power * 2**40) >> whole

    ends = [-0.25, 0.25, *range(1, 32)] if odd else [j - 0.5 for j in range(33)]
    sides = [sum(weight(a + (k + 0.5) / 16) for k in range(round(16 * (b - a)))) for a, b in itertools.pairwise(ends)]
    weights = [*sides[:0:-1], *sides, 32 * sum(weight(float(x)) for x in range(32, 124))]
    total = sum(weights)
    counts = [(weight * 4096 + total // 2) // total for weight in weights]
    for symbol in (30, 32, 63):
        counts[symbol] = max(counts[symbol], 1)
    counts[31] += 4096 - sum(counts)
    return np.array(counts)


def coded_integers(data: Array, rows: Array, columns: Array) -> Array:
    """A matrix of coded integers, from the magnitudes of its rows and columns."""
    kind = (rows - rows.min())[:, None] + (columns - columns.min())
    (classes, states), escapes = map(int, data[:4].copy().view("<u2")), int(data[4:8].copy().view("<u4")[0])
    assert classes == kind.max() + 1
    if states:
        assert states == 8
        return trellis(data[8:], kind, classes, escapes)
    laws, low_bits = data[8 : 8 + 2 * classes].reshape(-1, 2).astype(int).T
    data = data[8 + 2 * classes :]
    escaped, data = iter(data[: 4 * escapes].copy().view("<i4")), data[4 * escapes :]
    size = (int(low_bits[kind].sum()) + 7) // 8
    low, data = np.unpackbits(data[:size], bitorder="little"), data[size:]
    tables = np.stack([law(number) for number in laws])
    symbols = rans(data, kind.ravel(), tables, min(max(kind.size // 8192, 1), 32))
    codes, place = [], 0
    for symbol, bits in zip(symbols, low_bits[kind.ravel()]):
        high = int(symbol) - 31 if symbol < 63 else int(next(escaped))
        rest = sum(int(low[place + bit]) << bit for bit in range(bits))
        place += bits
        codes.append((high << int(bits)) + rest - ((1 << int(bits)) >> 1))
    return np.array(codes).reshape(kind.shape)


TURNS = ((0, 2), (5, 7), (1, 3), (6, 4), (2, 0), (4, 6), (3, 1), (7, 5))


def trellis(data: Array, kind: Array, classes: int, escapes: int) -> Array:
    """A matrix of coded integers of a trellis, from what follows its header."""
    laws, low_bits = data[: 4 * classes].reshape(-1, 2).astype(int).T
    escaped, data = iter(data[4 * classes :][: 4 * escapes].copy().view("<i4")), data[4 * classes + 4 * escapes :]
    size = int(data[:4].copy().view("<u4")[0])
    low, data = np.unpackbits(data[4 : 4 + size], bitorder="little"), data[4 + size :]
    tables = np.stack([law(number, place >= classes) for place, number in enumerate(laws)])
    start = np.cumsum(tables, 1) - tables
    lanes = min(max(kind.size // 8192, 1), 32)
    lane_states, words = (
        [int(state) for state in data[: 4 * lanes].copy().view("<u4")],
        iter(data[4 * lanes :].copy().view("<u2")),
    )
    turn, codes, place = [0] * kind.shape[1], np.zeros(kind.shape, np.int64), 0
    for i, (r, c) in enumerate(np.ndindex(kind.shape)):
        odd = turn[c] % 2
        which, state = int(kind[r, c]) + classes * odd, lane_states[i % lanes]
        symbol = int(np.searchsorted(start[which], state % 4096, "right")) - 1
        state = int(tables[which, symbol]) * (state // 4096) + state % 4096 - int(start[which, symbol])
        lane_states[i % lanes] = 65536 * state + int(next(words)) if state < 65536 else state
        level, bits = symbol - 31 if symbol < 63 else int(next(escaped)), int(low_bits[which])
        level = (level << bits) + sum(int(low[place + bit]) << bit for bit in range(bits)) - ((1 << bits) >> 1)
        place += bits
        codes[r, c] = 2 * level - odd * int(np.sign(level))
        turn[c] = TURNS[turn[c]][level % 2]
    assert next(words, None) is None
    return codes


def coded_matrix(data: Array, rows: int, columns: int) -> Array:
    """A matrix in a coded format."""
    sides = []
    for count in (rows, columns, rows, columns):
        base, length = int(data[:4].copy().view("<i4")[0]), int(data[4:8].copy().view("<u4")[0])
        sides.append(base + coded_integers(data[8 : 8 + length], np.zeros(1, int), np.zeros(count, int))[0])
        data = data[8 + length :]
    return coded_integers(data, sides[2], sides[3]) * 2.0 ** (sides[0] / 8)[:, None] * 2.0 ** (sides[1] / 8)


def order_groups(data: Array, runs: int, groups: int) -> Array:
    """Group of every entry of an order with ties, a run a row."""
    sizes = [int(size) for size in data[: 4 * groups].copy().view("<u4")]
    state = int(data[4 * groups : 4 * groups + 8].copy().view("<u8")[0])
    words = iter(data[4 * groups + 8 :].copy().view("<u4"))
    found = np.zeros((runs, sum(sizes)), np.int64)
    for run in found if groups > 1 else ():
        left = list(sizes)
        for i in range(len(run)):
            starts = [k + sum(left[:k]) * (65536 - groups) // sum(left) for k in range(groups)] + [65536]
            slot = state % 65536
            run[i] = group = max(k for k in range(groups) if starts[k] <= slot)
            state = (starts[group + 1] - starts[group]) * (state // 65536) + slot - starts[group]
            state = state if state >= 2**32 else state * 2**32 + int(next(words))
            left[group] -= 1
    assert state == 2**32
    assert next(words, None) is None
    return found


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
    if fmt["kind"] == "coded":
        assert tensors[f"{name}_coded"].shape == (fmt["stored"],)
        return coded_matrix(tensors[f"{name}_coded"], shape[0], prod(shape[1:])).astype(np.float32).reshape(shape)
    if fmt["kind"] == "sorted":
        assert tensors[f"{name}_ties"].shape == (fmt["stored"],)
        values = tensors[f"{name}_scale"].astype(np.float32) @ tensors[f"{name}_profile"]
        groups = order_groups(tensors[f"{name}_ties"], prod(shape) // fmt["run"], fmt["groups"])
        return np.take_along_axis(values, groups, 1).reshape(shape)
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


def hash_of(name: str, raw: bytes) -> str:
    """The hash of a tensor of a safetensors file."""
    entry, start = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])[name], 8 + int.from_bytes(raw[:8], "little")
    first, last = entry["data_offsets"]
    line = " ".join([entry["dtype"], *map(str, entry["shape"])]) + "\n"
    return xxh3_128(line.encode() + raw[start + first : start + last]).hexdigest()


def check_seal(text: str) -> None:
    """The seal of a JSON file."""
    before, value, after = re.split(r'(?<="checksum":)( ?"[0-9a-f]*")', text, maxsplit=1)
    open_text = before + re.sub(r"[0-9a-f]+", "", value) + after
    assert value.strip(' "') == xxh3_128(open_text.encode()).hexdigest()


def check_alone(path: Path) -> None:
    """The hashes of a safetensors file that stands alone."""
    raw = path.read_bytes()
    texts = dict(json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])["__metadata__"])
    hashes = json.loads(texts.pop("tensornet_compress.hashes"))
    told = "".join(f"{name}\n{texts[name]}" for name in sorted(texts))
    assert hashes["header"] == xxh3_128(told.encode()).hexdigest()
    assert hashes["tensors"] == {name: hash_of(name, raw) for name in hashes["tensors"]}


def read_model(folder: Path) -> tuple[dict[str, Any], Tensors, dict[str, Array]]:
    """Manifest, stored tensors, and the decoded weight of every layer of the plan."""
    text = (folder / "tensornet.json").read_text(encoding="utf-8")
    manifest, places = json.loads(text), dict.fromkeys(json.loads(text)["hashes"], "model.safetensors")
    if (folder / "model.safetensors.index.json").exists():
        places = json.loads((folder / "model.safetensors.index.json").read_text(encoding="utf-8"))["weight_map"]
    assert manifest["format_version"] == 1
    check_seal(text)
    raw = {place: (folder / place).read_bytes() for place in set(places.values())}
    assert manifest["hashes"] == {name: hash_of(name, raw[places[name]]) for name in manifest["hashes"]}
    for name, digest in manifest["files"].items():
        assert digest == xxh3_128((folder / name).read_bytes()).hexdigest()
    tensors = {}
    for place in raw:
        tensors |= read_safetensors(folder / place)[1]
    weights = {
        name: sum(term_dense(tensors, name, t, term) for t, term in enumerate(layer["spec"]["terms"]))
        for name, layer in manifest["plan"]["layers"].items()
    }
    return manifest, tensors, weights
