"""The ``bench`` commands: every method against every peer, rows written as they come."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer

from tensornet_compress.cli.bench_tables import comparison_table, result_tables
from tensornet_compress.cli.common import console, plain_errors
from tensornet_compress.cli.progress import RichProgress
from tensornet_compress.cli.report import invocation, leave_page
from tensornet_compress.errors import TensorNetError

if TYPE_CHECKING:
    from tensornet_compress.bench.run import Bench

app = typer.Typer(no_args_is_help=True, help="Benchmarks against peers at equal bytes; rows are written as they come.")

Quick = Annotated[bool, typer.Option("--quick", help="A few minutes: fewer sizes, windows and layers; see the settings.")]
Model = Annotated[str, typer.Option(help="Model folder, hub id or bundled name.")]
Text = Annotated[str, typer.Option(help="wikipedia, python-reference, or a text file.")]
Bits = Annotated[str | None, typer.Option(help="Sizes, separated by commas: bits per weight or per element.")]
Methods = Annotated[str | None, typer.Option(help="Methods, separated by commas; all by default.")]
JsonFile = Annotated[Path | None, typer.Option("--json", help="The result file, written row by row.")]
HtmlFile = Annotated[Path | None, typer.Option("--html", help="Also write the report, one self-contained page.")]
Resume = Annotated[bool, typer.Option("--resume", help="Make only the rows that the result file lacks.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the result file.")]
Compare = Annotated[Path | None, typer.Option(help="An older result: print old and new values and their ratios.")]
Plugin = Annotated[list[Path] | None, typer.Option(help="Python file that registers methods, texts or metrics (repeatable).")]
Threads = Annotated[int | None, typer.Option(help="Threads of torch; its own choice by default.", min=1)]
NoInstall = Annotated[bool, typer.Option("--no-install", help="Never install peers into the side folder; skip them.")]


@dataclass(frozen=True)
class Output:
    """Where results go and what they are held against."""

    json: Path | None
    html: Path | None
    resume: bool
    overwrite: bool
    compare: Path | None
    plugin: list[Path] | None
    threads: int | None
    no_install: bool


@app.command()
@plain_errors
def weights(
    quick: Quick = False,
    model: Model = "smollm2-135m",
    text: Text = "wikipedia",
    bits: Bits = None,
    methods: Methods = None,
    targets: Annotated[str | None, typer.Option(help="Patterns of layers, separated by commas; all by default.")] = None,
    blocks: Annotated[
        int | None, typer.Option(help="Compress only this many blocks in the middle; all by default.", min=1)
    ] = None,
    json: JsonFile = None,
    html: HtmlFile = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    compare: Compare = None,
    plugin: Plugin = None,
    threads: Threads = None,
    no_install: NoInstall = False,
) -> None:
    """Quality of compressed weights on held-out text, ours and peers at equal bytes."""

    def make() -> Mapping[str, Bench]:
        from tensornet_compress.bench.weights import WeightBench, WeightSettings

        changed: dict[str, Any] = {"model": model, "text": text, "methods": words(methods), "targets": words(targets)}
        changed |= {"bits": numbers(bits)} if bits else {}
        changed |= {"blocks": blocks} if blocks else {}
        return {"weights": WeightBench(WeightSettings(**changed) if quick else WeightSettings.full(**changed))}

    execute(make, Output(json, html, resume, overwrite, compare, plugin, threads, no_install))


@app.command()
@plain_errors
def kv(
    quick: Quick = False,
    model: Model = "smollm2-135m",
    text: Text = "wikipedia",
    bits: Bits = None,
    methods: Methods = None,
    profile: Annotated[Path | None, typer.Option(help="Folder of our profile; made there when it is missing.")] = None,
    json: JsonFile = None,
    html: HtmlFile = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    compare: Compare = None,
    plugin: Plugin = None,
    threads: Threads = None,
    no_install: NoInstall = False,
) -> None:
    """What a model answers with compressed caches, ours and peers at equal bits."""

    def make() -> Mapping[str, Bench]:
        from tensornet_compress.bench.caches import CacheBench, CacheSettings

        changed: dict[str, Any] = {"model": model, "text": text, "methods": words(methods)}
        changed |= {"bits": numbers(bits)} if bits else {}
        changed |= {"profile": str(profile)} if profile else {}
        return {"kv": CacheBench(CacheSettings(**changed) if quick else CacheSettings.full(**changed))}

    execute(make, Output(json, html, resume, overwrite, compare, plugin, threads, no_install))


@app.command()
@plain_errors
def search(
    quick: Quick = False,
    tensor: Annotated[
        list[str] | None, typer.Option(help="FILE.npy, an image, FILE.safetensors:NAME or a bundled tensor (repeatable).")
    ] = None,
    errors: Annotated[str | None, typer.Option(help="Relative errors to keep, separated by commas.")] = None,
    methods: Methods = None,
    budget: Annotated[float | None, typer.Option(help="Seconds that our search may take for one row.")] = None,
    json: JsonFile = None,
    html: HtmlFile = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    compare: Compare = None,
    plugin: Plugin = None,
    threads: Threads = None,
    no_install: NoInstall = False,
) -> None:
    """Bytes at equal error of a searched network, the usual formats and other tools."""

    def make() -> Mapping[str, Bench]:
        from tensornet_compress.bench.search import SearchBench, SearchSettings

        changed: dict[str, Any] = {"methods": words(methods), "tensors": tuple(tensor) if tensor else None}
        changed |= {"errors": numbers(errors)} if errors else {}
        changed |= {"budget": budget} if budget else {}
        return {"search": SearchBench(SearchSettings(**changed) if quick else SearchSettings.full(**changed))}

    execute(make, Output(json, html, resume, overwrite, compare, plugin, threads, no_install))


@app.command()
@plain_errors
def speed(
    quick: Quick = False,
    model: Model = "smollm2-135m",
    text: Text = "wikipedia",
    tracks: Annotated[str | None, typer.Option(help="forward, decoding, compressing, searching; all by default.")] = None,
    json: JsonFile = None,
    html: HtmlFile = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    compare: Compare = None,
    plugin: Plugin = None,
    threads: Threads = None,
    no_install: NoInstall = False,
) -> None:
    """Forward, decoding, compressing and searching as ratios to dense and to peers in one run."""

    def make() -> Mapping[str, Bench]:
        from tensornet_compress.bench.speed import SpeedBench, SpeedSettings

        changed: dict[str, Any] = {"model": model, "text": text, "tracks": words(tracks)}
        return {"speed": SpeedBench(SpeedSettings(**changed) if quick else SpeedSettings.full(**changed))}

    execute(make, Output(json, html, resume, overwrite, compare, plugin, threads, no_install))


@app.command(name="all")
@plain_errors
def everything(
    quick: Quick = False,
    model: Model = "smollm2-135m",
    text: Text = "wikipedia",
    tensor: Annotated[list[str] | None, typer.Option(help="Tensors to search, see `bench search` (repeatable).")] = None,
    json: JsonFile = None,
    html: HtmlFile = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    compare: Compare = None,
    plugin: Plugin = None,
    threads: Threads = None,
    no_install: NoInstall = False,
) -> None:
    """Weights, caches, search and speed, one after the other, into one result."""

    def make() -> Mapping[str, Bench]:
        from tensornet_compress.bench.caches import CacheBench, CacheSettings
        from tensornet_compress.bench.search import SearchBench, SearchSettings
        from tensornet_compress.bench.speed import SpeedBench, SpeedSettings
        from tensornet_compress.bench.weights import WeightBench, WeightSettings

        both: dict[str, Any] = {"model": model, "text": text}
        found: dict[str, Any] = {"tensors": tuple(tensor) if tensor else None}
        return {
            "weights": WeightBench(WeightSettings(**both) if quick else WeightSettings.full(**both)),
            "kv": CacheBench(CacheSettings(**both) if quick else CacheSettings.full(**both)),
            "search": SearchBench(SearchSettings(**found) if quick else SearchSettings.full(**found)),
            "speed": SpeedBench(SpeedSettings(**both) if quick else SpeedSettings.full(**both)),
        }

    execute(make, Output(json, html, resume, overwrite, compare, plugin, threads, no_install))


def execute(make: Callable[[], Mapping[str, Bench]], output: Output) -> None:
    """Check what can be checked first, run, and print."""
    from tensornet_compress.bench.compare import compare
    from tensornet_compress.bench.run import load_plugins, run
    from tensornet_compress.bench.side import SIDE
    from tensornet_compress.report import read_result

    old = read_result(output.compare) if output.compare is not None else None
    if output.resume and output.json is None:
        raise TensorNetError("--resume needs --json FILE: the result to go on with")
    if output.json is not None and output.json.is_dir():
        raise TensorNetError(f"--json {str(output.json)!r} is a folder; give a file name")
    load_plugins(output.plugin or [])
    SIDE.install = not output.no_install
    if output.threads is not None:
        torch.set_num_threads(output.threads)
    benches = make()
    if output.overwrite and not output.resume and output.json is not None:
        output.json.unlink(missing_ok=True)
    progress = RichProgress()
    result = run(benches, invocation(), output.json, output.resume, progress, lambda line: progress.say(line))
    for table in result_tables(result):
        console().print(table)
    if old is not None:
        console().print(comparison_table(compare(old, result)))
    if output.html is not None:
        leave_page(result, output.html)


def words(text: str | None) -> tuple[str, ...] | None:
    """``a,b`` -> ("a", "b")."""
    return None if text is None else tuple(word.strip() for word in text.split(",") if word.strip())


def numbers(text: str) -> tuple[float, ...]:
    """``4.5,3`` -> (4.5, 3.0).

    Raises:
        TensorNetError: not positive numbers.
    """
    try:
        found = tuple(float(word) for word in words(text) or ())
    except ValueError:
        found = ()
    if not found or min(found) <= 0:
        raise TensorNetError(f"{text!r} is not a list of positive numbers; write 4.5,3")
    return found
