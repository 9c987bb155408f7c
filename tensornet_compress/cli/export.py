"""The ``export`` command: a saved folder in a format of others."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tensornet_compress.cli.common import JsonFile, write_json
from tensornet_compress.cli.ending import plain_errors


@plain_errors
def export(
    folder: Annotated[Path, typer.Argument(help="A folder written by this tool.")],
    target: Annotated[Path, typer.Argument(help="The folder to write; with --to gguf the file.")],
    to: Annotated[str, typer.Option(help="compressed-tensors, gguf or dense.")] = "compressed-tensors",
    dtype: Annotated[
        str | None,
        typer.Option(help="Of dense weights: float32, bfloat16 or float16; with gguf no layer is rounded then."),
    ] = None,
    nearest: Annotated[
        str | None, typer.Option(help="Round linear layers without an exact form to this number format, e.g. int8g32.")
    ] = None,
    fuse: Annotated[bool, typer.Option(help="One scheme for layers that vLLM joins (compressed-tensors).")] = True,
    bits: Annotated[
        list[int] | None, typer.Option(help="Bits of codes (compressed-tensors, repeatable); 4 and 8 by default.")
    ] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace what is at TARGET.")] = False,
    json: JsonFile = None,
) -> None:
    """Write a compressed model for transformers, vLLM or llama.cpp without this package, with its bytes and what that loses."""
    from tensornet_compress.integrations.export import export as write

    options = {"dtype": dtype, "nearest": nearest, "fuse": fuse, "overwrite": overwrite} | ({"bits": bits} if bits else {})
    report = write(folder, target, to, **options)  # type: ignore[arg-type]
    typer.echo(str(report))
    write_json(json, report.model_dump(mode="json"))
