"""The ``bench`` commands: every method against every peer, rows written as they come."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, fields
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer
from rich import text as rich_text
from rich.table import Table

from tensornet_compress.cli.common import RichProgress, console, invocation
from tensornet_compress.cli.ending import plain_errors
from tensornet_compress.cli.report import leave_page
from tensornet_compress.errors import TensorNetError
from tensornet_compress.files.whole import check_file, locked
from tensornet_compress.report import Result

if TYPE_CHECKING:
    from tensornet_compress.bench.compare import Comparison

app = typer.Typer(no_args_is_help=True, help="Benchmarks against peers at equal bytes; rows are written as they come.")

Quick = Annotated[bool, typer.Option("--quick", help="A few minutes: fewer sizes, windows and layers; see the settings.")]
Model = Annotated[str, typer.Option(help="Model folder, hub id or bundled name.")]
Text = Annotated[str, typer.Option(help="wikipedia, python-reference, or a text file.")]
Bits = Annotated[str | None, typer.Option(help="Sizes, separated by commas: bits per weight or per element.")]
Methods = Annotated[str | None, typer.Option(help="Methods, separated by commas; all by default.")]
Benches = Mapping[str, Any]
MODEL, TEXT = "smollm2-135m", "wikipedia"
TRACK_NAMES = "forward, products, generating, decoding, coding, memory, compressing, searching, loading; all by default."


@dataclass(frozen=True)
class Output:
    """The options of every benchmark: where results go and what they are held against."""

    json: Annotated[Path | None, typer.Option("--json", help="The result file, written row by row.")] = None
    html: Annotated[Path | None, typer.Option("--html", help="Also write the report, one self-contained page.")] = None
    resume: Annotated[bool, typer.Option("--resume", help="Make only the rows that the result file lacks.")] = False
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the result file.")] = False
    compare: Annotated[Path | None, typer.Option(help="An older result: print old and new values and their ratios.")] = None
    plugin: Annotated[
        list[Path] | None, typer.Option(help="Python file that registers methods, texts or metrics (repeatable).")
    ] = None
    only: Annotated[str, typer.Option(help="Make only rows whose 'subject: method' this regular expression matches.")] = ""
    threads: Annotated[int | None, typer.Option(help="Threads of torch; its own choice by default.", min=1)] = None
    workers: Annotated[
        int, typer.Option(help="Processes that make rows, each on one thread; timed rows stay alone.", min=1)
    ] = 1
    cluster: Annotated[str | None, typer.Option(help="Make rows on a cluster in place of that; see `weights --cluster`.")] = (
        None
    )
    no_install: Annotated[bool, typer.Option("--no-install", help="Never install peers into the side folder; skip them.")] = (
        False
    )


def benchmark(name: str) -> Callable[[Callable[..., Benches]], Callable[..., None]]:
    """Make a command of a function that gives the benchmarks to run; it takes the options of the function and of ``Output``."""

    def register(make: Callable[..., Benches]) -> Callable[..., None]:
        @wraps(make)
        def command(**options: Any) -> None:
            output = Output(**{field.name: options.pop(field.name) for field in fields(Output)})
            execute(lambda: make(**options), output)

        options = [*_parameters(make), *_parameters(Output)]
        command.__signature__ = inspect.Signature(options)  # type: ignore[attr-defined]
        command.__annotations__ = {option.name: option.annotation for option in options}
        return app.command(name=name)(plain_errors(command))

    return register


def _parameters(of: Callable[..., Any]) -> Iterator[inspect.Parameter]:
    return iter(inspect.signature(of, eval_str=True).parameters.values())


def _settings(kind: Any, quick: bool, **given: Any) -> Any:
    """Settings of a quick or a full run, with what was given in place of theirs."""
    changed = {name: value for name, value in given.items() if value is not None}
    return kind(**changed) if quick else kind.full(**changed)


@benchmark("weights")
def weights(
    quick: Quick = False,
    model: Model = MODEL,
    text: Text = TEXT,
    bits: Bits = None,
    methods: Methods = None,
    targets: Annotated[str | None, typer.Option(help="Patterns of layers, separated by commas; all by default.")] = None,
    blocks: Annotated[
        int | None, typer.Option(help="Compress only this many blocks in the middle; all by default.", min=1)
    ] = None,
) -> Benches:
    """Quality of compressed weights on held-out text, ours and peers at equal bytes."""
    from tensornet_compress.bench.weights import WeightBench, WeightSettings

    which = {"model": model, "text": text, "methods": words(methods), "targets": words(targets)}
    return {"weights": WeightBench(_settings(WeightSettings, quick, bits=numbers(bits), blocks=blocks, **which))}


@benchmark("model")
def whole_model(
    quick: Quick = False,
    model: Model = MODEL,
    text: Text = TEXT,
    bits: Bits = None,
    methods: Methods = None,
) -> Benches:
    """Whole files of a language model, ours and peers': bytes, memory, load, speed, three held-out domains, zero-shot sets."""
    from tensornet_compress.bench.files import FileBench, FileSettings

    which = {"model": model, "text": text, "methods": words(methods)}
    return {"model": FileBench(_settings(FileSettings, quick, bits=numbers(bits), **which))}


@benchmark("kv")
def kv(
    quick: Quick = False,
    model: Model = MODEL,
    text: Text = TEXT,
    bits: Bits = None,
    methods: Methods = None,
    profile: Annotated[Path | None, typer.Option(help="Folder of our profile; made there when it is missing.")] = None,
) -> Benches:
    """What a model answers with compressed caches, ours and peers at equal bits."""
    from tensornet_compress.bench.caches import CacheBench, CacheSettings

    which = {"model": model, "text": text, "methods": words(methods), "profile": str(profile) if profile else None}
    return {"kv": CacheBench(_settings(CacheSettings, quick, bits=numbers(bits), **which))}


@benchmark("search")
def search(
    quick: Quick = False,
    tensor: Annotated[
        list[str] | None, typer.Option(help="FILE.npy, an image, FILE.safetensors:NAME or a bundled tensor (repeatable).")
    ] = None,
    errors: Annotated[str | None, typer.Option(help="Relative errors to keep, separated by commas.")] = None,
    methods: Methods = None,
    budget: Annotated[float | None, typer.Option(help="Seconds that our search may take for one row.")] = None,
) -> Benches:
    """Bytes at equal error of a searched network, the usual formats and other tools."""
    from tensornet_compress.bench.search import SearchBench, SearchSettings

    which = {"methods": words(methods), "tensors": tuple(tensor) if tensor else None, "budget": budget}
    return {"search": SearchBench(_settings(SearchSettings, quick, errors=numbers(errors), **which))}


@benchmark("speed")
def speed(
    quick: Quick = False,
    model: Model = MODEL,
    text: Text = TEXT,
    tracks: Annotated[
        str | None,
        typer.Option(help=TRACK_NAMES),
    ] = None,
) -> Benches:
    """Forward, decoding, compressing and searching as ratios to dense and to peers in one run."""
    from tensornet_compress.bench.speed import SpeedBench, SpeedSettings

    return {"speed": SpeedBench(_settings(SpeedSettings, quick, model=model, text=text, tracks=words(tracks)))}


@benchmark("all")
def everything(
    quick: Quick = False,
    model: Model = MODEL,
    text: Text = TEXT,
    tensor: Annotated[list[str] | None, typer.Option(help="Tensors to search, see `bench search` (repeatable).")] = None,
) -> Benches:
    """Weights, caches, search and speed, one after the other, into one result."""
    from tensornet_compress.bench.caches import CacheBench, CacheSettings
    from tensornet_compress.bench.search import SearchBench, SearchSettings
    from tensornet_compress.bench.speed import SpeedBench, SpeedSettings
    from tensornet_compress.bench.weights import WeightBench, WeightSettings

    which = {"model": model, "text": text}
    return {
        "weights": WeightBench(_settings(WeightSettings, quick, **which)),
        "kv": CacheBench(_settings(CacheSettings, quick, **which)),
        "search": SearchBench(_settings(SearchSettings, quick, tensors=tuple(tensor) if tensor else None)),
        "speed": SpeedBench(_settings(SpeedSettings, quick, **which)),
    }


def execute(make: Callable[[], Benches], output: Output) -> None:
    """Check what can be checked first, run, and print."""
    from tensornet_compress.bench.compare import compare
    from tensornet_compress.bench.peer_packages import SIDE
    from tensornet_compress.bench.run import RowsApart, load_plugins, run
    from tensornet_compress.report import read_result

    old = read_result(output.compare) if output.compare is not None else None
    if output.resume and output.json is None:
        raise TensorNetError("--resume needs --json FILE: the result to go on with")
    for option, path in (("--json", output.json), ("--html", output.html)):
        if path is not None:
            check_file(path, option)
    load_plugins(output.plugin or [])
    SIDE.install = not output.no_install
    apart = None
    if output.workers > 1 or output.cluster is not None:
        if (output.threads or 1) > 1:
            raise TensorNetError(f"rows of other processes run on one thread; leave out --threads {output.threads}")
        workers = output.workers if output.workers > 1 else None
        apart = RowsApart(workers, output.cluster or "processes", tuple(output.plugin or ()), not output.no_install)
    if output.threads is not None or apart is not None:
        torch.set_num_threads(output.threads or 1)
    benches = make()
    if apart is not None and all(bench.timed for bench in benches.values()):
        raise TensorNetError("its rows measure time, with nothing beside them; leave out --workers and --cluster")
    progress = RichProgress()
    lock = nullcontext() if output.json is None else locked(output.json)
    with lock:
        result = run(
            benches, invocation(), output.json, output.resume, progress, progress.say, output.overwrite, output.only, apart
        )
    console().print(*result_tables(result))
    if old is not None:
        comparison = compare(old, result)
        console().print(comparison_table(comparison), *(f"note: {note}" for note in comparison.notes), sep="\n")
    if output.html is not None:
        leave_page(result, output.html)


def words(text: str | None) -> tuple[str, ...] | None:
    """``a,b`` -> ("a", "b")."""
    return None if text is None else tuple(word.strip() for word in text.split(",") if word.strip())


def numbers(text: str | None) -> tuple[float, ...] | None:
    """``4.5,3`` -> (4.5, 3.0).

    Raises:
        TensorNetError: not positive numbers.
    """
    try:
        parsed = tuple(map(float, words(text) or ()))
    except ValueError:
        parsed = ()
    if text is not None and not (parsed and min(parsed) > 0):
        raise TensorNetError(f"{text!r} is not a list of positive numbers; write 4.5,3")
    return parsed or None


def result_tables(result: Result) -> Iterator[Table]:
    """One table for each task; a skipped row shows its reason."""
    for task in dict.fromkeys(row.task for row in result.rows):
        rows = [row for row in result.rows if row.task == task]
        measures = {name: m for name, m in result.measures.items() if any(name in row.values for row in rows)}
        table = Table("subject", "method", "asked", title=task)
        for measure in measures.values():
            table.add_column(f"{measure.title} ({measure.unit})" if measure.unit else measure.title, justify="right")
        for row in rows:
            values = [_number(row.values[name]) if name in row.values else "-" for name in measures]
            if row.skipped is not None:
                values = [f"skipped: {row.skipped}", *[""] * (len(measures) - 1)]
            asked = "" if row.budget is None else f"{row.budget:g}"
            table.add_row(row.subject, rich_text.Text(row.method, style="bold") if row.ours else row.method, asked, *values)
        yield table


def comparison_table(comparison: Comparison) -> Table:
    """Old, new and ratio of every value."""
    table = Table("row", "value", "old", "new", "new / old", title="against the older result")
    for change in comparison.changes:
        mark = "" if change.better is None else " better" if change.better else " worse"
        table.add_row(change.row, change.value, _number(change.old), _number(change.new), f"{change.ratio:.3f}{mark}")
    return table


def _number(value: float) -> str:
    return f"{value:,.0f}" if value == int(value) and abs(value) >= 1000 else f"{value:.4g}"
