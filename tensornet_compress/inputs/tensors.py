"""Tensors from files: arrays of NumPy, images, brain volumes, and arrays by name in HDF5, NetCDF, Zarr and safetensors. Nothing
pickled is ever opened."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from tensornet_compress.errors import MissingExtraError, TensorNetError

_HDF5 = (".h5", ".hdf5", ".nc")
_NAMED = (".safetensors", ".zarr", *_HDF5)
_IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")


def read_tensor(file: str) -> Tensor:
    """The tensor that ``FILE.npy``, an image, ``FILE.nii``, ``FILE.nii.gz``, ``DIR.zarr``, or with the name of an array after a
    colon ``FILE.safetensors:NAME``, ``FILE.h5:NAME``, ``FILE.nc:NAME`` or ``DIR.zarr:NAME`` names.

    Raises:
        TensorNetError: no such file or tensor, an unknown kind of file, or one that cannot be read.
        MissingExtraError: a reader's package is not installed.
    """
    text, name = file, ""
    for suffix in _NAMED:
        stem, colon, after = file.partition(f"{suffix}:")
        if colon:
            text, name = stem + suffix, after
    path = Path(text)
    suffix = ".nii.gz" if path.name.lower().endswith(".nii.gz") else path.suffix.lower()
    if path.is_dir() and suffix != ".zarr":
        raise TensorNetError(f"{str(path)!r} is a folder; give a file: FILE.npy, an image or FILE.safetensors:NAME")
    if not path.exists():
        raise TensorNetError(f"no file at {str(path)!r}")
    if not path.is_file() and suffix != ".zarr":
        raise TensorNetError(f"no regular file at {str(path)!r}")
    readers: dict[str, Callable[[Path], Tensor]] = {
        ".npy": _array,
        ".nii": _volume,
        ".nii.gz": _volume,
        ".zarr": partial(_zarr, name=name),
        ".safetensors": partial(_stored, name=name),
        **dict.fromkeys(_HDF5, partial(_dataset, name=name)),
        **dict.fromkeys(_IMAGES, _image),
    }
    reader = readers.get(suffix)
    if reader is None:
        raise TensorNetError(f"{str(path)!r} is none of {', '.join(readers)}; pickled files are never opened")
    try:
        return reader(path)
    except TensorNetError:
        raise
    except Exception as error:
        # Readers raise errors of any kind on damaged files: SyntaxError, MemoryError, those of tokenize.
        raise TensorNetError(f"cannot read {str(path)!r}: {type(error).__name__}: {error}") from error


def _stored(path: Path, name: str) -> Tensor:
    """One tensor of a safetensors file."""
    with safe_open(path, framework="pt") as stored:
        names = list(stored.keys())
        tensor: Tensor = stored.get_tensor(_chosen(path, name, names))
    return tensor


def _array(path: Path) -> Tensor:
    """A numeric array."""
    with path.open("rb") as file:
        if not file.read(6).startswith(b"\x93NUMPY"):
            raise TensorNetError(f"{str(path)!r} is not a .npy file")
    try:
        # Mapped, so that a header that tells of more than the file holds is refused before memory is taken for it.
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except ValueError as error:
        if "pickle" in str(error).lower() or "object" in str(error).lower():
            raise TensorNetError(f"{str(path)!r} is damaged or holds Python objects; pickled data is never opened") from error
        raise
    return _numbers(path, array)


def _numbers(path: Path, array: Any) -> Tensor:
    """Real numbers; what is neither single nor double precision becomes fp32."""
    array = np.asarray(array)
    if array.dtype.kind not in "fiub":
        raise TensorNetError(f"{str(path)!r} holds {array.dtype}; give real numbers")
    kept = array.dtype.newbyteorder("=") in (np.dtype("f4"), np.dtype("f8"))
    native = array.astype(array.dtype.newbyteorder("=") if kept else np.float32)
    return torch.from_numpy(np.array(native, order="C"))


def _package(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        raise MissingExtraError(f"this file needs {name}; run: python -m pip install 'tensornet-compress[arrays]'") from error


def _volume(path: Path) -> Tensor:
    """A NIfTI volume, scaled as its header says, in single precision."""
    return _numbers(path, _package("nibabel").load(path).get_fdata(dtype=np.float32))


def _dataset(path: Path, name: str) -> Tensor:
    """A data set of an HDF5 file, as which NetCDF 4 is read too; the only one where none is named."""
    h5py = _package("h5py")
    with h5py.File(path, "r") as file:
        names: list[str] = []
        file.visititems(lambda found, item: names.append(found) if isinstance(item, h5py.Dataset) else None)
        return _numbers(path, file[_chosen(path, name, names)][()])


def _zarr(path: Path, name: str) -> Tensor:
    """A Zarr array, or one of a group; the only one where none is named."""
    zarr = _package("zarr")
    store = zarr.open(str(path), mode="r")
    if isinstance(store, zarr.Array):
        return _numbers(path, store[...])
    return _numbers(path, store[_chosen(path, name, [found for found, _ in store.arrays()])][...])


def _chosen(path: Path, name: str, names: list[str]) -> str:
    if name in names or (not name and len(names) == 1):
        return name or names[0]
    shown = ", ".join(names[:8]) + (" ..." if len(names) > 8 else "")
    raise TensorNetError(f"{str(path)!r} has no tensor {name!r}; write {path}:NAME with one of {shown}")


_IMAGE_RANGES = {"L": 255.0, "LA": 255.0, "RGB": 255.0, "RGBA": 255.0, "I;16": 65535.0, "I;16B": 65535.0, "I": 1.0, "F": 1.0}
"""Largest number of a pixel by Pillow's mode; other modes are converted."""
_MOST_PIXELS = 1 << 25


def _image(path: Path) -> Tensor:
    """Pixels as fp32, (height, width) or (height, width, channels): 0 .. 1, but 32-bit images as they are stored; alpha is
    kept as a channel."""
    try:
        from PIL import Image
    except ImportError as error:
        raise MissingExtraError("images need Pillow; run: python -m pip install 'tensornet-compress[report]'") from error
    with Image.open(path) as opened:
        if (pixels := opened.width * opened.height) > _MOST_PIXELS:
            raise TensorNetError(f"{str(path)!r} has {pixels:,} pixels, images may have {_MOST_PIXELS:,}; cut it, or give .npy")
        mode = opened.mode
        if mode not in _IMAGE_RANGES:
            clear = "transparency" in opened.info or mode in ("PA", "La", "RGBa")
            mode = "L" if mode == "1" else "RGBA" if clear else "RGB"
        numbers = np.array(opened if mode == opened.mode else opened.convert(mode), dtype=np.float32)
    return torch.from_numpy(numbers / _IMAGE_RANGES[mode])
