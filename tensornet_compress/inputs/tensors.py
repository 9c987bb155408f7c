"""Tensors from files: ``FILE.npy``, images, ``FILE.safetensors:NAME``. Nothing pickled is ever opened."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from tensornet_compress.errors import MissingExtraError, TensorNetError

_IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")


def read_tensor(file: str) -> Tensor:
    """The tensor that ``FILE.npy``, an image or ``FILE.safetensors:NAME`` names.

    Raises:
        TensorNetError: no such file or tensor, an unknown kind of file, or one that cannot be read.
    """
    stem, colon, name = file.partition(".safetensors:")
    path = Path(f"{stem}.safetensors" if colon else file)
    if path.is_dir():
        raise TensorNetError(f"{str(path)!r} is a folder; give a file: FILE.npy, an image or FILE.safetensors:NAME")
    if not path.is_file():
        raise TensorNetError(f"no regular file at {str(path)!r}" if path.exists() else f"no file at {str(path)!r}")
    readers: dict[str, Callable[[Path], Tensor]] = {
        ".npy": _array,
        ".safetensors": partial(_stored, name=name),
        **dict.fromkeys(_IMAGES, _image),
    }
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise TensorNetError(f"{str(path)!r} is neither .npy nor .safetensors nor an image; pickled files are never opened")
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
        if name not in names:
            shown = ", ".join(names[:8]) + (" ..." if len(names) > 8 else "")
            raise TensorNetError(f"{str(path)!r} has no tensor {name!r}; write {path}:NAME with one of {shown}")
        tensor: Tensor = stored.get_tensor(name)
    return tensor


def _array(path: Path) -> Tensor:
    """A numeric array; what is neither single nor double precision becomes fp32."""
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
    if array.dtype.kind not in "fiub":
        raise TensorNetError(f"{str(path)!r} holds {array.dtype}; give real numbers")
    kept = array.dtype.newbyteorder("=") in (np.dtype("f4"), np.dtype("f8"))
    native = array.astype(array.dtype.newbyteorder("=") if kept else np.float32)
    return torch.from_numpy(np.array(native, order="C"))


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
