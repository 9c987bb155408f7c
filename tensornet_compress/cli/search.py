"""The ``search`` command: one tensor from a file."""

from __future__ import annotations

from math import log10
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from tensornet_compress.cli.common import JsonFile, RichProgress, check_output, invocation, write_json
from tensornet_compress.cli.ending import plain_errors
from tensornet_compress.cli.report import leave_page
from tensornet_compress.errors import TensorNetError
from tensornet_compress.files import save_network
from tensornet_compress.files.whole import whole_file
from tensornet_compress.inputs.tensors import read_tensor
from tensornet_compress.tensor import TensorNetwork

_PICTURES = (".png", ".svg", ".pdf")
_NETWORKS = (".tnz", ".safetensors")


def _reached(tensor: Tensor, network: TensorNetwork) -> str:
    """What the network takes beside the tensor, and how far it is off."""
    wide = tensor.double()
    lost = wide - network.to_dense(torch.float64)
    spread, mean = float(wide.max() - wide.min()), float(lost.square().mean())
    decibels = f", PSNR {10 * log10(spread**2 / mean):.1f} dB" if spread and mean else ""
    share = float(lost.norm()) / max(float(wide.norm()), 1e-300)
    return (
        f"{tensor.nbytes:,} bytes become {network.nbytes:,} ({tensor.nbytes / network.nbytes:.1f} times fewer): relative error "
        f"{share:.3g}, largest error of an entry {float(lost.abs().max()):.3g}{decibels}"
    )


@plain_errors
def search(
    file: Annotated[
        str,
        typer.Argument(help="FILE.npy, an image, FILE.nii.gz, .safetensors:NAME, .h5:NAME, .nc:NAME, DIR.zarr[:NAME]."),
    ],
    max_error: Annotated[float | None, typer.Option(help="Relative error to keep.")] = None,
    max_abs: Annotated[float | None, typer.Option(help="Farthest that any entry may be off.")] = None,
    psnr: Annotated[float | None, typer.Option(help="Peak signal-to-noise ratio to keep, in decibels.")] = None,
    max_bytes: Annotated[int | None, typer.Option(help="Stored bytes to keep.")] = None,
    ordering: Annotated[
        list[str] | None, typer.Option(help="mode, fibre or entry (repeatable); mode and fibre by default.")
    ] = None,
    topology: Annotated[list[str] | None, typer.Option(help="dense, svd, cut, tt, ttm or tree (repeatable).")] = None,
    format: Annotated[list[str] | None, typer.Option(help="Number formats allowed (repeatable).")] = None,  # noqa: A002
    time_budget: Annotated[float, typer.Option(help="Seconds.")] = 60.0,
    null: Annotated[bool, typer.Option(help="Run the null control.")] = True,
    seed: Annotated[int, typer.Option(help="Seed of the null control's shuffle.", min=0, max=2**63 - 1)] = 0,
    out: Annotated[Path | None, typer.Option(help="Write the network here (.tnz), for tnc.open_tensor.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write a report page of the search here (.html).")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write the picture of the search here (.png, .svg or .pdf).")] = None,
    json: JsonFile = None,
) -> None:
    """Search the layout, topology, ranks and formats of fewest bytes for one tensor."""
    from tensornet_compress import searching
    from tensornet_compress.report.from_search import search_result

    if plot is not None and plot.suffix not in _PICTURES:
        raise TensorNetError(f"--plot {str(plot)!r} must end in one of {', '.join(_PICTURES)}")
    source = file if Path(file).exists() else file.rpartition(":")[0]
    for option, path in (("--json", json), ("--out", out), ("--html", html), ("--plot", plot)):
        check_output(option, path, source or None)
    if out is not None and out.suffix not in _NETWORKS:
        raise TensorNetError(f"--out {str(out)!r} must end in one of {', '.join(_NETWORKS)}")
    if html is not None and html.suffix not in (".html", ".htm"):
        raise TensorNetError(f"--html {str(html)!r} must end in .html")
    tensor = read_tensor(file)
    result, network = searching.search_within(
        tensor,
        max_error=max_error,
        max_abs=max_abs,
        psnr=psnr,
        max_bytes=max_bytes,
        orderings=tuple(ordering) if ordering else searching.ORDERINGS,
        topologies=tuple(topology) if topology else searching.FAMILIES,
        formats=format,
        time_budget=time_budget,
        null=null,
        seed=seed,
        progress=RichProgress(),
    )
    typer.echo(str(result))
    typer.echo(_reached(tensor, network))
    if out is not None:
        typer.echo(f"{save_network(network, out):,} bytes written to {out}, with what the file tells of itself")
    if plot is not None:
        with whole_file(plot) as picture:
            result.plot().savefig(picture, format=plot.suffix[1:])
    front = [{"family": f.family, "nbytes": f.nbytes, "error": f.error, "ordered": f.ordered} for f in result.pareto]
    content: dict[str, Any] = {
        "file": file,
        "shape": list(tensor.shape),
        "limit": result.limit,
        "nbytes": network.nbytes,
        "error": result.error,
        "reason": result.reason,
        "gain": result.gain,
        "null": None if result.null is None else {"gain": result.null.gain, "nbytes": result.null.nbytes},
        "entry_sort": result.entry_sort and {"nbytes": result.entry_sort.nbytes, "error": result.entry_sort.error},
        "seconds": result.seconds,
        "finished": result.finished,
        "pareto": front,
        "spec": result.best.spec.model_dump(mode="json"),
    }
    write_json(json, content)
    if html is not None:
        leave_page(search_result(result, file, tensor.shape, invocation(), max_error, max_bytes), html)
