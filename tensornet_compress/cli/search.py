"""The ``search`` command: one tensor from a file."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tensornet_compress.cli.common import plain_errors, write_json
from tensornet_compress.cli.progress import RichProgress
from tensornet_compress.cli.report import invocation, leave_page
from tensornet_compress.errors import MissingExtraError, TensorNetError

_PICTURES = (".png", ".svg", ".pdf")
_IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")


def register(app: typer.Typer) -> None:
    """Add the ``search`` command to an app."""
    app.command(name="search")(plain_errors(search_command))


def search_command(
    file: Annotated[str, typer.Argument(help="FILE.npy, an image, or FILE.safetensors:NAME.")],
    max_error: Annotated[float | None, typer.Option(help="Relative error to keep.")] = None,
    max_bytes: Annotated[int | None, typer.Option(help="Stored bytes to keep.")] = None,
    ordering: Annotated[
        list[str] | None, typer.Option(help="mode, fibre or entry (repeatable); mode and fibre by default.")
    ] = None,
    topology: Annotated[list[str] | None, typer.Option(help="dense, svd, cut, tt, ttm or tree (repeatable).")] = None,
    format: Annotated[list[str] | None, typer.Option(help="Number formats allowed (repeatable).")] = None,  # noqa: A002
    time_budget: Annotated[float, typer.Option(help="Seconds.")] = 60.0,
    null: Annotated[bool, typer.Option(help="Run the null control.")] = True,
    seed: Annotated[int, typer.Option(help="Seed of the null control's shuffle.")] = 0,
    html: Annotated[Path | None, typer.Option(help="Write a report page of the search here (.html).")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write the picture of the search here (.png, .svg or .pdf).")] = None,
    json: Annotated[Path | None, typer.Option("--json", help="Also write the result to this JSON file.")] = None,
) -> None:
    """Search the layout, topology, ranks and formats of fewest bytes for one tensor."""
    from tensornet_compress.searching import FAMILIES, ORDERINGS, search

    if plot is not None and plot.suffix not in _PICTURES:
        raise TensorNetError(f"--plot {str(plot)!r} must end in one of {', '.join(_PICTURES)}")
    if html is not None and html.is_dir():
        raise TensorNetError(f"--html {str(html)!r} is a folder; give a file name")
    tensor = read_tensor(file)
    result = search(
        tensor,
        max_error=max_error,
        max_bytes=max_bytes,
        orderings=tuple(ordering) if ordering else ORDERINGS,  # type: ignore[arg-type]
        topologies=tuple(topology) if topology else FAMILIES,  # type: ignore[arg-type]
        formats=format,
        time_budget=time_budget,
        null=null,
        seed=seed,
        progress=RichProgress(),
    )
    typer.echo(str(result))
    if plot is not None:
        plot.parent.mkdir(parents=True, exist_ok=True)
        result.plot().savefig(plot)
    front = [{"family": f.family, "nbytes": f.nbytes, "error": f.error, "ordered": f.ordered} for f in result.pareto]
    content: dict[str, Any] = {
        "file": file,
        "shape": list(tensor.shape),
        "limit": result.limit,
        "nbytes": result.best.nbytes,
        "error": result.error,
        "reason": result.reason,
        "gain": result.gain,
        "null": None if result.null is None else {"gain": result.null.gain, "nbytes": result.null.nbytes},
        "entry_sort": None if result.entry_sort is None else asdict(result.entry_sort),
        "seconds": result.seconds,
        "finished": result.finished,
        "pareto": front,
        "spec": result.best.spec.model_dump(mode="json"),
    }
    write_json(json, content)
    if html is not None:
        from tensornet_compress.reporting.from_search import search_result

        leave_page(search_result(result, file, tensor.shape, invocation(), max_error, max_bytes), html)


def read_tensor(file: str) -> Tensor:
    """The tensor that ``FILE.npy``, an image or ``FILE.safetensors:NAME`` names.

    Raises:
        TensorNetError: no such file or tensor, an unknown kind of file, or one that cannot be read.
    """
    path, _, name = file.partition(":") if ".safetensors:" in file else (file, "", "")
    found = Path(path)
    if not found.is_file():
        raise TensorNetError(f"no file at {path!r}")
    suffix = found.suffix.lower()
    try:
        if suffix == ".npy":
            return _array(found)
        if suffix == ".safetensors":
            with safe_open(path, framework="pt") as stored:
                names = list(stored.keys())
                if name not in names:
                    shown = ", ".join(names[:8]) + (" ..." if len(names) > 8 else "")
                    raise TensorNetError(f"{path!r} has no tensor {name!r}; write {path}:NAME with one of {shown}")
                tensor: Tensor = stored.get_tensor(name)
                return tensor
        if suffix in _IMAGES:
            return _image(found)
    except (ValueError, EOFError, SafetensorError, OSError) as error:
        if isinstance(error, TensorNetError):
            raise
        raise TensorNetError(f"cannot read {path!r}: {error}") from error
    raise TensorNetError(f"{path!r} is neither .npy nor .safetensors nor an image; pickled files are never opened")


def _array(path: Path) -> Tensor:
    """A numeric array; what is neither single nor double precision becomes fp32."""
    with path.open("rb") as file:
        if not file.read(6).startswith(b"\x93NUMPY"):
            raise TensorNetError(f"{str(path)!r} is not a .npy file")
    try:
        array = np.load(path, allow_pickle=False)
    except ValueError as error:
        if "pickle" in str(error).lower() or "Object" in str(error):
            raise TensorNetError(f"{str(path)!r} is damaged or holds Python objects; pickled data is never opened") from error
        raise
    if array.dtype.kind not in "fiub":
        raise TensorNetError(f"{str(path)!r} holds {array.dtype}; give real numbers")
    kept = array.dtype.newbyteorder("=") in (np.dtype("f4"), np.dtype("f8"))
    native = array.astype(array.dtype.newbyteorder("=") if kept else np.float32)
    return torch.from_numpy(np.array(native, order="C"))


_IMAGE_RANGES = {"L": 255.0, "LA": 255.0, "RGB": 255.0, "RGBA": 255.0, "I;16": 65535.0, "I;16B": 65535.0, "I": 1.0, "F": 1.0}
"""Largest number of a pixel by Pillow's mode; other modes are converted."""


def _image(path: Path) -> Tensor:
    """Pixels as fp32, (height, width) or (height, width, channels): 0 .. 1, but 32-bit images as they are stored; alpha is
    kept as a channel."""
    try:
        from PIL import Image
    except ImportError as error:
        raise MissingExtraError("images need Pillow; run: python -m pip install 'tensornet-compress[report]'") from error
    with Image.open(path) as opened:
        mode = opened.mode
        if mode not in _IMAGE_RANGES:
            mode = "L" if mode == "1" else "RGB"
        pixels = np.array(opened if mode == opened.mode else opened.convert(mode), dtype=np.float32)
    return torch.from_numpy(pixels / _IMAGE_RANGES[mode])
