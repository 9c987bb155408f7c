"""The ``report`` command, and how other commands leave a report behind."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from tensornet_compress.cli.common import plain_errors
from tensornet_compress.errors import MissingExtraError, TensorNetError
from tensornet_compress.results import Result, read_result, write_result

JSON_NAME, HTML_NAME = "report.json", "report.html"


def register(app: typer.Typer) -> None:
    """Add the ``report`` command to an app."""
    app.command(name="report")(plain_errors(report_command))


def report_command(
    result: Annotated[Path, typer.Argument(help="Result file (JSON) of bench, weights, kv or search.")],
    html: Annotated[Path | None, typer.Option(help="Page to write; beside the JSON by default.")] = None,
) -> None:
    """Make one self-contained HTML page of a result: charts, tables and how to reproduce it."""
    from tensornet_compress.reporting import write_report

    target = html if html is not None else result.with_suffix(".html")
    if target == result:
        raise TensorNetError(f"{str(result)!r} would be overwritten by its own page; give another --html")
    typer.echo(f"wrote {write_report(read_result(result), target)}")


def leave_report(result: Result, folder: Path) -> None:
    """Write ``report.json`` and ``report.html`` to a folder; without the report's packages, only the JSON and a note."""
    written = write_result(result, folder / JSON_NAME)
    leave_page(result, folder / HTML_NAME, f"make the page later with: tensornet-compress report {written}")


def leave_page(result: Result, path: Path, otherwise: str = "") -> None:
    """Write the page, or a note where the report's packages are missing: what was measured is worth more than its picture."""
    from tensornet_compress.reporting import write_report

    try:
        typer.echo(f"report: {write_report(result, path)}")
    except MissingExtraError as error:
        typer.echo(f"note: no page was written: {error}{'; ' if otherwise else ''}{otherwise}", err=True)


def invocation() -> str:
    """The command line that is running, to be told in a report."""
    return shlex.join(["tensornet-compress", *sys.argv[1:]])
