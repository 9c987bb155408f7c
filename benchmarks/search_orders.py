"""Index orders: planted ones recovered, smooth data unscrambled, and no order accepted where there is none.

Kronecker sums of 8 products with 10 or 30 % of rows and columns out of place: ``recovered`` counts the seeds in which every
fibre is back. Smooth data: fields, images and autoregressive tables with the fibres of all axes shuffled (fields in 32
times and two dimensions too), bytes at 1 % error against those in order, and the least bytes that any code takes on average to
tell the orders. Null: i.i.d. Gaussian entries and shuffled weights; ``accepted`` counts the searches that used an order.

The bound: a decoded table within an error of two shuffled ones makes these at most twice that error apart, so that one code
word can stand for no more orders than lie that near to each other, and the average code takes at least ``log2 n!`` bits less
the logarithm of their number. That number is at most ``exp(t D) perm(exp(-t d))`` for distances ``d`` between fibres, a squared
error ``D`` and every ``t > 0``, and the permanent at most the product of the scalings that make all rows of the matrix sum to
1. Of several axes each is bounded while the orders of those before it are known and those of the others are not: entries are
sorted along these, which brings no two tables further apart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import permutations
from math import lgamma, log
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
import torch
from experiments import TIME, experiment
from torch import Tensor

import tensornet_compress as tnc
from tensornet_compress.bench.fields import heat_field, wave_field
from tensornet_compress.bench.harness import ERROR, STORED, Job
from tensornet_compress.bench.search import MEASURES as SEARCHED
from tensornet_compress.bench.tensors import TENSORS
from tensornet_compress.report import Measure

SIZES, SHARES, SEEDS = (128, 256, 512, 1024), (0.1, 0.3), 10
SMOOTH_SIZES, NULL_SEEDS, SECONDS = (128, 256, 512), 20, 60.0
LOW, LARGEST, TERMS = 8, 0.01, 8
BOX, VISCOSITY, TURBULENT_STEPS = 128, 2e-3, 1000
MEASURES = {
    "searches": Measure(title="searches"),
    "recovered": Measure(title="orders recovered exactly", better="higher"),
    "accepted": Measure(title="orders accepted", better="lower"),
    "nbytes": STORED,
    "order_nbytes": Measure(title="of them orders", unit="bytes"),
    "unordered_nbytes": Measure(title="without ordering", unit="bytes"),
    "least_order_nbytes": Measure(title="least for orders", unit="bytes"),
    "error": ERROR,
    "gain": SEARCHED["gain"],
    "null_gain": SEARCHED["null_gain"],
    "time": TIME,
}


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


def recovery(size: int, share: float) -> dict[str, Any]:
    """Scrambled Kronecker sums, searched."""
    recovered, seconds, native = 0, [], torch.arange(size)
    for seed in range(SEEDS):
        tensor, orders = scrambled_sum(size, share, seed)
        began = perf_counter()
        best = tnc.search(
            tensor, max_error=1e-4, topologies=("dense", "svd", "cut"), formats=("fp32",), null=False, time_budget=600
        ).best
        seconds.append(perf_counter() - began)
        fibres = {o.axis: torch.tensor(o.permutation) for o in best.spec.terms[0].layout.fibre_orders}
        recovered += all(torch.equal(orders[axis][fibres.get(axis, native)], native) for axis in (0, 1))
    return {"values": {"recovered": recovered, "searches": SEEDS, "nbytes": best.nbytes, "time": median(seconds)}}


def scrambled_sum(size: int, share: float, seed: int) -> tuple[Tensor, list[Tensor]]:
    """A sum of Kronecker products, and the orders that scrambled its rows and columns."""
    generator = torch.Generator().manual_seed(seed)
    high = size // LOW
    plain: Any = sum(
        torch.kron(torch.randn(high, high, generator=generator), torch.randn(LOW, LOW, generator=generator))
        for _ in range(TERMS)
    )
    orders = []
    for _ in range(2):
        order, some = torch.arange(size), torch.randperm(size, generator=generator)[: int(share * size)]
        order[some] = order[some[torch.randperm(len(some), generator=generator)]]
        orders.append(order)
    return plain[orders[0]][:, orders[1]], orders


def scrambled(make: Callable[[int], Tensor], size: int, method: str) -> dict[str, Any]:
    """Smooth data searched in order, or with all fibres shuffled."""
    tensor, shuffled = make(size).contiguous(), method == "shuffled"
    values = {"least_order_nbytes": least_order_nbytes(tensor, LARGEST)} if shuffled else {}
    generator = torch.Generator().manual_seed(1)
    for axis, length in enumerate(tensor.shape if shuffled else ()):
        tensor = tensor.index_select(axis, torch.randperm(length, generator=generator)).contiguous()
    result = tnc.search(tensor, max_error=LARGEST, time_budget=SECONDS * (1 + shuffled), null=shuffled)
    values |= {"nbytes": result.best.nbytes, "error": result.error}
    if shuffled:
        priced = result.best.spec.terms[0].layout.order_nbytes
        values |= {"order_nbytes": priced, "unordered_nbytes": result.unordered.nbytes, "gain": result.gain}
        values |= {} if result.null is None else {"null_gain": result.null.gain}
    return {"values": values, "settings": {"family": result.choice.family}}


def chance(kind: str, limit: dict[str, Any]) -> dict[str, Any]:
    weight = TENSORS["smollm2-k_proj"].load()
    accepted = 0
    for seed in range(NULL_SEEDS):
        generator = torch.Generator().manual_seed(seed)
        tensor = torch.randn(192, 320, generator=generator)
        if kind == "shuffled weights":
            order = torch.randperm(weight.numel(), generator=generator)
            tensor = weight.reshape(-1)[order].reshape(weight.shape)[:, :320].contiguous()
        accepted += tnc.search(tensor, time_budget=20, seed=seed + 1000, **limit).choice.ordered
    return {"values": {"accepted": accepted, "searches": NULL_SEEDS}}


_TRIED = 40
_SCALINGS = 40


def least_order_nbytes(tensor: Tensor, error: float) -> float:
    """Bytes that a code within the relative ``error`` (above 0) takes at least, on average over all orders of all axes, when
    nothing but the orders is to be told."""
    if not error > 0:
        raise ValueError(f"the bound is for errors above 0, was given {error}")
    table = tensor.double().cpu().numpy()
    most = (2 * error) ** 2 * float((table**2).sum())
    return max(
        0.0, *(sum(_axis_bytes(table, known, most) for known in _chain(order)) for order in permutations(range(table.ndim)))
    )


def _chain(order: tuple[int, ...]) -> list[tuple[int, tuple[int, ...]]]:
    """Each axis with those whose orders are not yet known."""
    return [(axis, order[place + 1 :]) for place, axis in enumerate(order)]


def _axis_bytes(table: np.ndarray, step: tuple[int, tuple[int, ...]], most: float) -> float:
    axis, unknown = step
    known = [other for other in range(table.ndim) if other != axis and other not in unknown]
    count = table.shape[axis]
    fibres = table.transpose(axis, *known, *unknown).reshape(count, int(np.prod([table.shape[a] for a in known])), -1)
    fibres = np.sort(fibres, axis=2).reshape(count, -1)
    norms = (fibres**2).sum(1)
    distances = np.maximum(norms[:, None] + norms - 2 * fibres @ fibres.T, 0.0)
    return max(0.0, lgamma(count + 1) - near_orders(distances, most)) / log(256)


def near_orders(distances: np.ndarray, most: float) -> float:
    """An upper bound of the logarithm of the number of permutations ``p`` with ``sum_i distances[i, p(i)] <= most``."""
    count = len(distances)
    bounds = []
    for weight in np.geomspace(0.1, 100, _TRIED) * count / most:
        kernel = np.exp(-weight * distances)
        columns = np.ones(count)
        for _ in range(_SCALINGS):
            rows = 1 / (kernel @ columns)
            columns = 1 / (rows @ kernel)
        rows = 1 / (kernel @ columns)
        bounds.append(weight * most - float(np.log(rows).sum() + np.log(columns).sum()))
    return min(bounds)


def jobs() -> Iterator[Job]:
    for size in SMOOTH_SIZES:
        for name, make in SMOOTH.items():
            shape = f"32 x {size // 4} x {size // 4}" if "times" in name else f"{size} x {size}"
            for method in ("in order", "shuffled"):
                work = partial(scrambled, make, size, method)
                yield Job("search", f"{name.split(',')[0]}, {shape}", method, work, LARGEST, "relative error", ours=True)
    for kind in ("Gaussian noise", "shuffled weights"):
        for name, value in (("max_error", 0.1), ("max_bytes", 40_000)):
            yield Job("search", f"{kind}, {name} {value:,}", "ours", partial(chance, kind, {name: value}), ours=True)
    for size in SIZES:
        for share in SHARES:
            work = partial(recovery, size, share)
            yield Job("search", f"Kronecker sum, {size} x {size}", "ours", work, share, "out of place", ours=True)


if __name__ == "__main__":
    experiment(jobs(), MEASURES, {"terms": TERMS, "low_digit": LOW, "budget": SECONDS})
