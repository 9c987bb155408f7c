"""Fields that searches run on: solutions of equations, made here, and measured ones that lie inside installed packages."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tensornet_compress.bench.peer_packages import SIDE
from tensornet_compress.errors import MissingExtraError
from tensornet_compress.inputs.tensors import read_tensor


def _sample(name: str) -> Tensor:
    """A sample photograph of scikit-learn, 0 to 1: (rows, columns, colours)."""
    try:
        from sklearn.datasets import load_sample_image
    except ImportError as error:
        raise MissingExtraError("the image comes with scikit-learn; run: python -m pip install scikit-learn") from error
    return torch.from_numpy(load_sample_image(name).astype(np.float32)) / 255


def image() -> Tensor:
    """scikit-learn's china.jpg averaged down, 0 to 1."""
    pixels = _sample("china.jpg").permute(2, 0, 1)[None]
    return torch.nn.functional.interpolate(pixels, (96, 128), mode="area")[0].permute(1, 2, 0)


def photo() -> Tensor:
    """scikit-learn's flower.jpg as it is, 0 to 1."""
    return _sample("flower.jpg")


def heat_field(size: int, steps: int = 32) -> Tensor:
    """Snapshots (time, x, y) of the heat equation from random hot spots, walls held at zero; solved by sines."""
    generator = torch.Generator().manual_seed(0)
    start = torch.where(torch.rand(size, size, generator=generator) > 0.98, 1.0, 0.0)
    place = torch.arange(1, size + 1, dtype=torch.float32)
    sines = (2 / (size + 1)) ** 0.5 * torch.sin(torch.pi * place[:, None] * place / (size + 1))
    decay = (place[:, None] ** 2 + place**2) * (torch.pi / (size + 1)) ** 2
    modes = sines @ start @ sines
    return torch.stack([sines @ (modes * torch.exp(-decay * t)) @ sines for t in torch.linspace(0.5, 16, steps)])


def wave_field(size: int, steps: int = 32) -> Tensor:
    """Snapshots (time, x, y) of a wave leaving an off-centre bump in a box with reflecting walls; leapfrog steps."""
    x, y = torch.linspace(0, 1, size)[:, None], torch.linspace(0, 1, size)[None]
    now = torch.exp(-60 * ((x - 0.3) ** 2 + (y - 0.55) ** 2))
    before, frames = now.clone(), []
    for step in range(4 * steps):
        padded = torch.nn.functional.pad(now[None, None], (1, 1, 1, 1), mode="replicate")[0, 0]
        spread = padded[2:, 1:-1] + padded[:-2, 1:-1] + padded[1:-1, 2:] + padded[1:-1, :-2] - 4 * now
        now, before = 2 * now - before + 0.25 * spread, now
        if step % 4 == 3:
            frames.append(now)
    return torch.stack(frames)


def _waves(size: int) -> Tensor:
    """Whole wave numbers along one axis, (size,)."""
    return torch.fft.fftfreq(size, 1 / size)


def vortices(size: int = 64, steps: int = 64) -> Tensor:
    """Snapshots (time, x, y) of the vorticity of a decaying flow in a periodic box: Navier-Stokes by Fourier modes, steps of
    second order."""
    generator = torch.Generator().manual_seed(0)
    kx, ky = _waves(size)[:, None], _waves(size)[None]
    square = (kx**2 + ky**2).clamp_min(1)
    kept = (kx.abs() < size / 3) & (ky.abs() < size / 3)
    start = torch.fft.fft2(torch.randn(size, size, generator=generator)) * torch.exp(-square / 32)
    now = start * 8 / torch.fft.ifft2(start).real.std()

    def slope(modes: Tensor) -> Tensor:
        stream = modes / square
        across, along, d_x, d_y = (torch.fft.ifft2(1j * m).real for m in (ky * stream, -kx * stream, kx * modes, ky * modes))
        return -torch.fft.fft2(across * d_x + along * d_y) * kept - 2e-3 * square * modes

    frames, step = [], 2e-3
    for _ in range(steps):
        frames.append(torch.fft.ifft2(now).real)
        for _ in range(8):
            now = now + step * slope(now + 0.5 * step * slope(now))
    return torch.stack(frames)


def turbulence(size: int = 64) -> Tensor:
    """A random field (x, y, z) without preferred places or directions, its power falling as the wave number to -11/3."""
    generator = torch.Generator().manual_seed(0)
    k = _waves(size)
    square = k[:, None, None] ** 2 + k[:, None] ** 2 + k**2
    noise = torch.fft.fftn(torch.randn(size, size, size, generator=generator))
    return torch.fft.ifftn(noise * torch.where(square > 0, square, 1.0) ** (-11 / 12) * (square > 0)).real


def burgers(steps: int = 256, size: int = 512) -> Tensor:
    """Snapshots (time, x) of Burgers' equation from a sum of sines, which steepens into shocks: Godunov's scheme."""
    x = 2 * torch.pi * torch.arange(size) / size
    now, frames = x.sin() + 0.5 * (2 * x + 1).sin() + 0.25 * (5 * x).cos(), []
    for _ in range(steps):
        frames.append(now)
        for _ in range(4):
            left, right = now.clamp_min(0), now.roll(-1).clamp_max(0)
            flux = 0.5 * torch.maximum(left**2, right**2)
            now = now - 0.25 * (flux - flux.roll(1))
    return torch.stack(frames)


def spots(size: int = 96, steps: int = 32) -> Tensor:
    """Snapshots (time, x, y) of the Gray-Scott equations in a periodic box: spots that grow and divide."""
    generator = torch.Generator().manual_seed(0)
    u, v = torch.ones(size, size), torch.zeros(size, size)
    for x, y in torch.randint(0, size - 8, (8, 2), generator=generator).tolist():
        u[x : x + 8, y : y + 8], v[x : x + 8, y : y + 8] = 0.5, 0.25

    def spread(field: Tensor) -> Tensor:
        return sum((field.roll(shift, axis) for shift in (1, -1) for axis in (0, 1)), start=-4 * field)

    frames = []
    for _ in range(steps):
        for _ in range(100):
            meeting = u * v * v
            u, v = u + 0.16 * spread(u) - meeting + 0.035 * (1 - u), v + 0.08 * spread(v) + meeting - 0.1 * v
        frames.append(v)
    return torch.stack(frames)


def elevation() -> Tensor:
    """Metres above the sea around a fault near Jacksboro, a sample of matplotlib: (south to north, west to east)."""
    spec = find_spec("matplotlib")
    if spec is None or not spec.submodule_search_locations:
        raise MissingExtraError("elevations come with matplotlib; run: python -m pip install 'tensornet-compress[report]'")
    with np.load(Path(spec.submodule_search_locations[0]) / "mpl-data/sample_data/jacksboro_fault_dem.npz") as stored:
        return torch.from_numpy(stored["elevation"].astype(np.float32))


def brain() -> Tensor:
    """The mean T1 image of 152 brains (MNI152 2009a, a file of nilearn) averaged down to 2 mm, (x, y, z)."""
    file = SIDE.folder("nilearn") / "nilearn/datasets/data/mni_icbm152_t1_tal_nlin_sym_09a_converted.nii.gz"
    whole = read_tensor(str(file))
    return torch.nn.functional.avg_pool3d(whole[None], 2, ceil_mode=True)[0]
