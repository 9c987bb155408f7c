"""``tensornet-compress``: weights, eval, generate, inspect, kv, search, bench, report."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from tensornet_compress.cli.bench import app as bench_app
from tensornet_compress.cli.common import (
    check_vocabularies,
    console,
    figure,
    load_any,
    load_any_tokenizer,
    plain_errors,
    text_windows,
    write_json,
)
from tensornet_compress.cli.kv import check_cache_options, evaluate_cache, find_profile
from tensornet_compress.cli.kv import register as register_kv
from tensornet_compress.cli.progress import RichProgress
from tensornet_compress.cli.report import invocation, leave_report
from tensornet_compress.cli.report import register as register_report
from tensornet_compress.cli.search import register as register_search
from tensornet_compress.cli.size import given_budget
from tensornet_compress.cli.usage import PlainGroup
from tensornet_compress.errors import TensorNetError
from tensornet_compress.version import __version__

app = typer.Typer(
    cls=PlainGroup,
    no_args_is_help=True,
    add_completion=False,
    help="Compress neural networks as tensor networks, and count every byte.",
)
JsonFile = Annotated[Path | None, typer.Option("--json", help="Also write the result to this JSON file.")]
_METRICS = ("auto", "euclidean", "diagonal", "input", "row-fisher", "kronecker")
Dtype = Annotated[str, typer.Option(help="Dtype to load a plain model in: auto, float32, bfloat16 or float16.")]
Length = Annotated[int, typer.Option(help="Tokens per window.", min=2)]
KvBits = Annotated[float | None, typer.Option(help="Also compress the KV cache to this many payload bits per element.")]
KvMode = Annotated[str, typer.Option(help="live or storage: the kind of compressed cache.")]
KvProfile = Annotated[Path | None, typer.Option(help="Profile folder of the `kv` command; MODEL/kv_profile if there is one.")]


def run() -> None:
    """Entry point of the ``tensornet-compress`` script."""
    app()


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    """Compress neural networks as tensor networks, and count every byte."""


@app.command()
@plain_errors
def weights(
    model: Annotated[str, typer.Argument(help="Model folder, hub id, or smollm2-135m / all-minilm-l6-v2.")],
    out: Annotated[Path, typer.Argument(help="Folder to write.")],
    bits_per_weight: Annotated[float | None, typer.Option(help="Stored bits per weight of the targeted modules.")] = None,
    ratio: Annotated[float | None, typer.Option(help="Stored bytes of the whole model / original bytes.")] = None,
    size: Annotated[str | None, typer.Option(help="Stored bytes of the whole model, e.g. 90MB or 120000000.")] = None,
    targets: Annotated[list[str] | None, typer.Option(help="Patterns of modules to compress (repeatable).")] = None,
    ignore: Annotated[list[str] | None, typer.Option(help="Patterns of modules to leave alone (repeatable).")] = None,
    method: Annotated[str, typer.Option(help="auto, dense, svd, residual, tt, ttm, tree or searched.")] = "auto",
    format: Annotated[list[str] | None, typer.Option(help="Number formats allowed, e.g. bf16, int4g64z (repeatable).")] = None,  # noqa: A002
    allocator: Annotated[str, typer.Option(help="sensitivity, energy or uniform.")] = "sensitivity",
    metric: Annotated[
        str, typer.Option(help="auto (least held-out divergence), euclidean, diagonal, input, row-fisher or kronecker.")
    ] = "input",
    refine: Annotated[bool, typer.Option("--refine", help="Fit behind the compressed prefix, then block by block.")] = False,
    isvt: Annotated[bool, typer.Option("--isvt", help="Lower ranks (bf16) by iterative singular value thresholding.")] = False,
    heal: Annotated[int, typer.Option(help="Steps of distillation from the original afterwards.", min=0)] = 0,
    calibration: Annotated[Path | None, typer.Option(help="Text file; the bundled Wikipedia sample by default.")] = None,
    samples: Annotated[int, typer.Option(help="Calibration windows.", min=1)] = 32,
    length: Length = 512,
    encoder: Annotated[
        bool, typer.Option("--encoder", help="Load the encoder without a head even where the model has one.")
    ] = False,
    dtype: Dtype = "auto",
    search: Annotated[
        float | None, typer.Option(help="Seconds to search the layout of each kind of layer; none by default.")
    ] = None,
    by_block: Annotated[
        bool, typer.Option("--by-block", help="Hold calibration statistics of one block at a time; more passes, less memory.")
    ] = False,
    workers: Annotated[int | None, typer.Option(help="Processes; the number of processors by default.")] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace OUT if it exists.")] = False,
    json: JsonFile = None,
) -> None:
    """Compress the weights of MODEL into the folder OUT."""
    from tensornet_compress.cli.common import DTYPES
    from tensornet_compress.compressing import compress
    from tensornet_compress.files import MANIFEST, save
    from tensornet_compress.inputs import calibration_windows, load_causal_lm, load_encoder, model_kind, resolve_model
    from tensornet_compress.nn.plan import PLAN_ATTRIBUTE
    from tensornet_compress.report.from_weights import weights_result

    budget = given_budget(bits_per_weight, ratio, size)
    if out.exists() and not overwrite:
        raise TensorNetError(f"{str(out)!r} exists; choose another folder, or pass --overwrite")
    if dtype not in DTYPES:
        raise TensorNetError(f"unknown dtype {dtype!r}; choose from {sorted(DTYPES)}")
    if metric not in _METRICS:
        raise TensorNetError(f"unknown metric {metric!r}; choose one of {', '.join(_METRICS)}")
    others = method != "auto" or format or allocator != "sensitivity" or search is not None or by_block
    if isvt and (others or refine or metric == "auto"):
        raise TensorNetError(
            "--isvt lowers ranks of two bf16 cores of each layer by itself; leave out --method, --format, --allocator, "
            "--search, --by-block, --refine and --metric auto"
        )
    if (Path(model) / MANIFEST).is_file():
        raise TensorNetError(f"{model!r} is compressed already; give the original model")
    tokenizer = load_any_tokenizer(model)
    headless = encoder or model_kind(model) == "encoder"
    loaded = (load_encoder if headless else load_causal_lm)(model, DTYPES[dtype])
    if calibration is None:
        windows = calibration_windows(tokenizer, length, samples)
    else:
        windows = text_windows(tokenizer, calibration, length, samples)
    folder = Path(resolve_model(model))
    which: dict[str, Any] = {"targets": targets, "ignore": ignore or ()}
    how: dict[str, Any] = {"method": method, "formats": format, "allocator": allocator, "workers": workers, "search": search}
    how["by_block"] = by_block
    how["source"] = folder if folder.is_dir() and dtype == "auto" else None
    staged = isvt or refine or heal or metric == "auto"
    # Stages need batches for three uses.
    batches = list(windows.split(max(1, min(4, samples // 3)) if staged else 4))
    if staged:
        from tensornet_compress.train import Schedule, compress_in_stages

        report = compress_in_stages(
            loaded,
            budget,
            batches,
            metric=metric,
            refine=refine,
            rank_schedule=Schedule() if isvt else None,
            heal_steps=heal,
            progress=RichProgress(),
            **which | ({} if isvt else how),
        )
    else:
        report = compress(loaded, budget, batches, metric=metric, progress=RichProgress(), **which, **how)
    save(loaded, out, tokenizer, report, overwrite=overwrite)
    typer.echo(str(report))
    held = folder_nbytes(out)
    leave_report(weights_result(report, getattr(loaded, PLAN_ATTRIBUTE, None), model, invocation()), out)
    whole = folder_nbytes(out)
    typer.echo(f"saved to {out} ({whole:,} bytes on disk: the model {held:,}, its report {whole - held:,})")
    sizes = {"folder_nbytes": whole, "model_files_nbytes": held}
    write_json(json, report.model_dump(mode="json") | {"summary": report.summary()} | sizes)


@app.command(name="eval")
@plain_errors
def evaluate(
    model: Annotated[str, typer.Argument(help="Model folder (compressed or not), hub id or embedded name.")],
    reference: Annotated[str | None, typer.Option(help="Model to compare with.")] = None,
    text: Annotated[Path | None, typer.Option(help="Text file; held-out articles of the bundled sample by default.")] = None,
    windows: Annotated[int, typer.Option(help="Number of windows.", min=1)] = 16,
    length: Length = 512,
    kv_bits: KvBits = None,
    kv_mode: KvMode = "live",
    kv_profile: KvProfile = None,
    dtype: Dtype = "auto",
    json: JsonFile = None,
) -> None:
    """Perplexity of MODEL, and divergence from --reference, on held-out text; with --kv-bits also what a compressed cache
    changes against MODEL with an exact cache."""
    from tensornet_compress.compressing import model_nbytes
    from tensornet_compress.evaluate import Reference, evaluate_language
    from tensornet_compress.inputs import heldout_windows

    check_cache_options(kv_bits, kv_mode, kv_profile)
    profile = find_profile(model, kv_profile) if kv_bits is not None else None
    tokenizer = load_any_tokenizer(model)
    ids = heldout_windows(tokenizer, length, windows) if text is None else text_windows(tokenizer, text, length, windows)
    progress = RichProgress()
    steps = -(-len(ids) // 4)
    known = None
    if reference is not None:
        check_vocabularies(model, reference)
        original = load_any(reference, dtype)
        with progress.stage("reference", steps) as advance:
            known = Reference(original, ids, advance=advance)
        del original
    loaded = load_any(model, dtype)
    with progress.stage("evaluate", steps) as advance:
        quality = evaluate_language(loaded, ids, known, advance=advance)
    result = {"model": model, "reference": reference, "nbytes": model_nbytes(loaded)} | quality.model_dump()
    if kv_bits is not None:
        with progress.stage("cache", len(ids)) as advance:
            cache = evaluate_cache(loaded, ids, kv_bits, kv_mode, profile, advance)
        result |= {f"kv_{name}": value for name, value in cache.items()}
        result["kv_profile_nbytes"] = 0 if profile is None else profile.nbytes
    table = Table("figure", "value")
    for name, value in result.items():
        table.add_row(name, figure(name, value))
    console().print(table)
    write_json(json, result)


@app.command()
@plain_errors
def generate(
    model: Annotated[str, typer.Argument(help="Model folder (compressed or not), hub id or embedded name.")],
    prompt: Annotated[str, typer.Option(help="Text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to add.", min=1)] = 40,
    kv_bits: KvBits = None,
    kv_mode: KvMode = "live",
    kv_profile: KvProfile = None,
    dtype: Dtype = "auto",
    json: JsonFile = None,
) -> None:
    """Continue a prompt greedily; with --kv-bits through a compressed cache, whose bytes go to stderr."""
    check_cache_options(kv_bits, kv_mode, kv_profile)
    if not prompt:
        raise TensorNetError("the prompt is empty; give some text to continue")
    profile = find_profile(model, kv_profile) if kv_bits is not None else None
    tokenizer = load_any_tokenizer(model)
    loaded = load_any(model, dtype)
    result: dict[str, Any] = {"model": model, "prompt": prompt}
    with RichProgress().stage("generate", max_new_tokens) as advance, ExitStack() as stack:
        if kv_bits is not None:
            from tensornet_compress.kv.context import compressed

            caches = stack.enter_context(compressed(loaded, bits=kv_bits, mode=kv_mode, profile=profile))  # type: ignore[arg-type]
        result["text"] = continue_text(loaded, tokenizer, prompt, max_new_tokens, advance)
    typer.echo(result["text"])
    if kv_bits is not None:
        report = caches[-1].report()
        typer.echo(f"KV cache: {report}", err=True)
        if not report.sealed_tokens:
            block, window = caches[-1].block, caches[-1].window
            typer.echo(
                f"note: nothing was compressed yet; a block of {block} tokens is sealed once {window} newer ones follow it",
                err=True,
            )
        result["kv"] = asdict(report) | {"nbytes": report.nbytes}
    write_json(json, result)


@app.command()
@plain_errors
def inspect(
    out: Annotated[Path, typer.Argument(help="A folder written by this tool.")],
    all_layers: Annotated[bool, typer.Option("--all", help="Every layer, not only totals per kind of layer.")] = False,
    json: JsonFile = None,
) -> None:
    """Per layer: network, bytes, error and share of the budget; the ledger adds up to the file."""
    from tensornet_compress.evaluate.ledger import folder_ledger

    ledger = folder_ledger(out)
    out_console = console()
    table = Table("layer", "network", "bytes", "bits/weight", "error", "share", title=str(out))
    for row in ledger.layers if all_layers else ledger.by_kind():
        error = "" if row.error is None else f"{row.error:.3g}"
        network = f"{row.family}: {row.network}" if row.family and all_layers else row.network
        table.add_row(row.name, network, f"{row.nbytes:,}", f"{row.bits_per_weight:.3f}", error, f"{row.share:.1%}")
    out_console.print(table)
    totals = Table("part of the folder", "bytes")
    for name, value in ledger.totals().items():
        totals.add_row(name, f"{value:,}")
    out_console.print(totals)
    write_json(json, ledger.model_dump(mode="json") | {"totals": ledger.totals()})


register_kv(app)
register_search(app)
app.add_typer(bench_app, name="bench")
register_report(app)


def continue_text(
    model: Any, tokenizer: Any, prompt: str, max_new_tokens: int, advance: Callable[[], None] = lambda: None
) -> str:
    """Greedy continuation, prompt included; ``advance`` is called after each token."""
    import torch

    from tensornet_compress.nn import decoded

    def after_token(ids: torch.Tensor, scores: object, **_: object) -> torch.Tensor:
        advance()
        return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

    ids = tokenizer(prompt, return_tensors="pt").to(next(model.parameters()).device)
    with torch.no_grad(), decoded(model):
        out = model.generate(
            **ids,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=tokenizer.eos_token_id,
            stopping_criteria=[after_token],
        )
    text: str = tokenizer.decode(out[0], skip_special_tokens=True)
    return text


def folder_nbytes(folder: Path) -> int:
    """Bytes of all files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
