"""Index orders: planted ones recovered, smooth data unscrambled, and no order accepted where there is none.

    python benchmarks/search_orders.py [--sizes 128 256 512 1024] [--parts smooth null kronecker] [--data field ...]

Kronecker: sums of 8 Kronecker products with 10 or 30 % of rows and columns out of place; recovered means that every fibre is
back. Smooth: fields, images and autoregressive tables with all rows and columns shuffled (and all times, of fields in 32 times
and two dimensions), bytes at 1 % error against those of the unscrambled table, with and without the price of the orders, and
the least bytes that any code takes on average to tell them (``order_bound.py``). Null: i.i.d. Gaussian entries and shuffled
weights; accepted means that an order was used. Parts and data that are not run keep what the JSON has.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from time import perf_counter
from typing import Any

import numpy as np
import torch
from common import MODEL, RESULTS, write_result
from order_bound import least_order_nbytes
from torch import Tensor

import tensornet_compress as tnc
from tensornet_compress.bench.fields import heat_field, wave_field

LOW = 8
ERROR = 0.01
TERMS = 8
BOX, VISCOSITY, TURBULENT_STEPS = 128, 2e-3, 1000


def planted(size: int, share: float, seed: int) -> tuple[Tensor, list[Tensor]]:
    """A scrambled Kronecker sum and the orders that scrambled its rows and columns."""
    generator = torch.Generator().manual_seed(seed)
    high = size // LOW
    plain = sum(
        torch.kron(torch.randn(high, high, generator=generator), torch.randn(LOW, LOW, generator=generator))
        for _ in range(TERMS)
    )
    orders = []
    for _ in range(2):
        order, some = torch.arange(size), torch.randperm(size, generator=generator)[: int(share * size)]
        order[some] = order[some[torch.randperm(len(some), generator=generator)]]
        orders.append(order)
    return torch.as_tensor(plain)[orders[0]][:, orders[1]], orders


def kronecker(seeds: int, sizes: list[int], known: list[dict[str, Any]], done: Callable[[list[dict[str, Any]]], None]) -> None:
    """Rows of sizes that are not asked for stay as they are ``known``."""
    rows = [row for row in known if row["size"] not in sizes]
    for size in sizes:
        for share in (0.1, 0.3):
            exact, seconds, nbytes = 0, [], 0
            for seed in range(seeds):
                tensor, orders = planted(size, share, seed)
                began = perf_counter()
                result = tnc.search(
                    tensor, max_error=1e-4, topologies=("dense", "svd", "cut"), formats=("fp32",), null=False, time_budget=600
                )
                seconds.append(perf_counter() - began)
                found = {o.axis: torch.tensor(o.permutation) for o in result.best.spec.terms[0].layout.fibre_orders}
                native = torch.arange(size)
                exact += all(torch.equal(orders[a][found.get(a, native)], native) for a in (0, 1))
                nbytes = result.best.nbytes
            row = {"size": size, "share": share, "seeds": seeds, "recovered": exact, "nbytes": nbytes}
            rows.append(row | {"dense_nbytes": 4 * size * size, "median_seconds": float(np.median(seconds))})
            print(rows[-1], flush=True)
            done(rows)


def field(size: int) -> Tensor:
    x, y = torch.linspace(0, 1, size)[:, None], torch.linspace(0, 1, size)[None]
    return torch.sin(18 * x * y + 2 * x) + torch.exp(-20 * ((x - 0.4) ** 2 + (y - 0.6) ** 2))


def wave(size: int) -> Tensor:
    """A damped wave from two sources: space by time."""
    x, t = torch.linspace(0, 1, size)[:, None], torch.linspace(0, 1, size)[None]
    return sum(torch.exp(-3 * t) * torch.cos(25 * ((x - c).abs() - t)) / (0.3 + (x - c).abs()) for c in (0.2, 0.7))  # type: ignore[return-value]


def vorticity(size: int) -> Tensor:
    """Vorticity of decaying turbulence in a periodic box: Navier-Stokes, pseudo-spectral on 128 x 128 with fourth-order
    Runge-Kutta steps, viscosity by an integrating factor, two thirds of the modes; interpolated by its Fourier series."""
    waves = np.fft.fftfreq(BOX, 1 / BOX)
    kx, ky = waves[:, None], np.abs(waves[None, : BOX // 2 + 1])
    squares = kx**2 + ky**2
    inverse, kept = 1 / np.where(squares == 0, 1.0, squares), (np.abs(kx) < BOX / 3) & (ky < BOX / 3)
    noise = np.fft.rfft2(np.random.default_rng(0).standard_normal((BOX, BOX)))
    now = noise * kept * np.sqrt(squares) * np.exp(-((np.sqrt(squares) - 6) ** 2) / 8)
    now *= 5 / np.sqrt(np.mean(np.fft.irfft2(now) ** 2))
    step, back = 0.005, np.fft.irfft2
    half = np.exp(-VISCOSITY * squares * step / 2)

    def change(spectrum: np.ndarray) -> np.ndarray:
        u, v = back(1j * ky * spectrum * inverse), back(-1j * kx * spectrum * inverse)
        turned: np.ndarray = np.fft.rfft2(u * back(1j * kx * spectrum) + v * back(1j * ky * spectrum))
        return -(turned * kept)

    for _ in range(TURBULENT_STEPS):
        a = change(now)
        b = change(half * (now + step / 2 * a))
        c = change(half * now + step / 2 * b)
        d = change(half**2 * now + step * half * c)
        now = half**2 * now + step / 6 * (half**2 * a + 2 * half * (b + c) + d)
    wide = np.zeros((size, size // 2 + 1), complex)
    rows = waves.astype(int)
    wide[rows[:, None], np.arange(BOX // 2 + 1)] = now * kept * (size / BOX) ** 2
    return torch.from_numpy(back(wide, s=(size, size)).astype(np.float32))


def image(size: int) -> Tensor:
    """Brightness of scikit-learn's china.jpg, averaged down."""
    from sklearn.datasets import load_sample_image

    pixels = torch.from_numpy(load_sample_image("china.jpg").astype(np.float32)).mean(2)[None, None]
    return torch.nn.functional.interpolate(pixels, (size, size), mode="area")[0, 0] / 255


def table(size: int) -> Tensor:
    """An autoregressive time-channel table: smooth in time, neighbouring channels alike."""
    generator = torch.Generator().manual_seed(7)
    noise = torch.randn(size, 6, generator=generator)
    series = torch.zeros(size, 6)
    for step in range(1, size):
        series[step] = 0.98 * series[step - 1] + 0.2 * noise[step]
    place = torch.linspace(0, 1, size)[:, None]
    return series @ torch.exp(-30 * (place - torch.linspace(0, 1, 6)[None]) ** 2).T


SMOOTH: dict[str, Callable[[int], Tensor]] = {
    "field": field,
    "wave": wave,
    "vorticity": vorticity,
    "image": image,
    "time-channel table": table,
    "wave, 32 times": lambda size: wave_field(size // 4),
    "heat, 32 times": lambda size: heat_field(size // 4),
}


def smooth(
    sizes: list[int], names: list[str], budget: float, known: list[dict[str, Any]], done: Callable[[list[dict[str, Any]]], None]
) -> None:
    """Rows of sizes and data that are not asked for stay as they are ``known``."""
    rows = [row for row in known if row["size"] not in sizes or row["data"] not in names]
    places = {name: place for place, name in enumerate(SMOOTH)}
    for size in sizes:
        for name, make in ((name, SMOOTH[name]) for name in names):
            try:
                plain = make(size).contiguous()
            except ImportError as error:
                rows.append({"data": name, "size": size, "skipped": str(error)})
                continue
            generator = torch.Generator().manual_seed(1)
            scrambled = plain
            for axis, length in enumerate(plain.shape):
                scrambled = scrambled.index_select(axis, torch.randperm(length, generator=generator))
            plain_result = tnc.search(plain, max_error=ERROR, time_budget=budget, null=False)
            result = tnc.search(scrambled.contiguous(), max_error=ERROR, time_budget=2 * budget)
            priced = result.best.spec.terms[0].layout.order_nbytes
            row = {
                "data": name,
                "size": size,
                "shape": list(plain.shape),
                "plain_nbytes": plain_result.best.nbytes,
                "scrambled_nbytes": result.best.nbytes,
                "order_nbytes": priced,
                "least_order_nbytes": float(least_order_nbytes(plain, ERROR)),
                "ratio": result.best.nbytes / plain_result.best.nbytes,
                "ratio_without_price": (result.best.nbytes - priced) / plain_result.best.nbytes,
                "without_ordering_nbytes": result.unordered.nbytes,
                "gain": result.gain,
                "null_gain": None if result.null is None else result.null.gain,
                "family": result.choice.family,
                "error": result.error,
            }
            rows.append(row)
            print(row, flush=True)
            done(sorted(rows, key=lambda one: (one["size"], places[one["data"]])))


def nothing(seeds: int) -> list[dict[str, Any]]:
    """Where no order should be accepted."""
    from tensornet_compress.inputs import load_causal_lm

    weight = load_causal_lm(MODEL).model.layers[10].self_attn.k_proj.weight.detach().float()
    rows = []
    limits: list[dict[str, Any]] = [{"max_error": 0.1}, {"max_bytes": 40_000}]
    for limit in limits:
        for kind in ("gaussian", "shuffled weight"):
            accepted = 0
            for seed in range(seeds):
                generator = torch.Generator().manual_seed(seed)
                if kind == "gaussian":
                    tensor = torch.randn(192, 320, generator=generator)
                else:
                    order = torch.randperm(weight.numel(), generator=generator)
                    tensor = weight.reshape(-1)[order].reshape(weight.shape)[:, :320].contiguous()
                accepted += tnc.search(tensor, time_budget=20, seed=seed + 1000, **limit).choice.ordered
            rows.append({"data": kind, "limit": limit, "seeds": seeds, "accepted": accepted})
            print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--null-seeds", type=int, default=20)
    parser.add_argument("--sizes", type=int, nargs="+", default=[128, 256, 512, 1024], help="of the Kronecker sums")
    parser.add_argument("--smooth", type=int, nargs="+", default=[128, 256, 512])
    parser.add_argument("--data", nargs="+", default=list(SMOOTH), choices=SMOOTH, help="smooth ones")
    parser.add_argument("--budget", type=float, default=60.0, help="seconds for a search of smooth data")
    parser.add_argument("--parts", nargs="+", default=["smooth", "null", "kronecker"])
    arguments = parser.parse_args()
    path = RESULTS / "search_orders.json"
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    content = {key: value for key, value in content.items() if key in ("smooth", "null", "kronecker")}
    content["settings"] = vars(arguments) | {"terms": TERMS, "low_digit": LOW}

    def done(part: str, rows: list[dict[str, Any]]) -> None:
        content[part] = rows
        write_result("search_orders", content)

    if "smooth" in arguments.parts:
        known = content.get("smooth", [])
        smooth(arguments.smooth, arguments.data, arguments.budget, known, lambda rows: done("smooth", rows))
    if "null" in arguments.parts:
        done("null", nothing(arguments.null_seeds))
    if "kronecker" in arguments.parts:
        kronecker(arguments.seeds, arguments.sizes, content.get("kronecker", []), lambda rows: done("kronecker", rows))


if __name__ == "__main__":
    main()
