"""The ``report`` command, and how other commands leave a report behind."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tensornet_compress.cli.ending import plain_errors
from tensornet_compress.errors import MissingExtraError, TensorNetError
from tensornet_compress.report import Result, joined, read_result, without_peer_layers, write_result


@plain_errors
def report(
    results: Annotated[list[Path], typer.Argument(help="Result files (JSON) of bench, weights or kv.")],
    html: Annotated[Path | None, typer.Option(help="Page to write; beside the JSON by default.")] = None,
    json: Annotated[Path | None, typer.Option(help="Also write the results put together as one file.")] = None,
    light: Annotated[bool, typer.Option("--light", help="Leave the peers' layers out of it, most of a file.")] = False,
) -> None:
    """Make one self-contained HTML page of a result: charts, tables and how to reproduce it.

    Several files are put together: other methods, sizes or benchmarks with the same settings.
    """
    from tensornet_compress.report import write_report

    whole = joined([read_result(path) for path in results])
    whole = without_peer_layers(whole) if light else whole
    target = html if html is not None else (json or results[0]).with_suffix(".html")
    for taken, option in ((target, "--html"), (json, "--json")):
        if taken in results:
            raise TensorNetError(f"{str(taken)!r} is a result and would be overwritten; give another {option}")
    if json is not None:
        typer.echo(f"wrote {write_result(whole, json)}")
    typer.echo(f"wrote {write_report(whole, target)}")


def leave_report(result: Result, folder: Path) -> None:
    """Write ``report.json`` and ``report.html`` to a folder; without the report's packages, only the JSON and a note."""
    written = write_result(result, folder / "report.json")
    leave_page(result, folder / "report.html", f"; make the page later with: tensornet-compress report {written}")


def leave_page(result: Result, path: Path, otherwise: str = "") -> None:
    """Write the page, or a note where the report's packages are missing: what was measured is worth more than its picture."""
    from tensornet_compress.report import write_report

    try:
        typer.echo(f"report: {write_report(result, path)}")
    except MissingExtraError as error:
        typer.echo(f"note: no page was written: {error}{otherwise}", err=True)
