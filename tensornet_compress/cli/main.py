"""``tensornet-compress``: weights, eval, generate, inspect, kv, search, export, bench, report."""

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
    AnyModel,
    Dtype,
    JsonFile,
    Length,
    PlainGroup,
    RichProgress,
    TrustRemoteCode,
    check_json,
    check_vocabularies,
    console,
    load_any,
    load_any_tokenizer,
    print_figures,
    text_windows,
    write_json,
)
from tensornet_compress.cli.common import quiet as quieted
from tensornet_compress.cli.ending import debug as debugging
from tensornet_compress.cli.ending import ending, plain_errors
from tensornet_compress.cli.export import export
from tensornet_compress.cli.kv import KvMode, KvProfile, check_cache_options, find_profile, kv
from tensornet_compress.cli.report import report
from tensornet_compress.cli.search import search
from tensornet_compress.cli.weights import weights
from tensornet_compress.errors import TensorNetError
from tensornet_compress.version import __version__

app = typer.Typer(
    cls=PlainGroup,
    no_args_is_help=True,
    help="Compress neural networks as tensor networks, and count every byte.",
)
KvBits = Annotated[float | None, typer.Option(help="Also compress the KV cache to this many payload bits per element.")]


def run() -> None:
    """Entry point, where the commands are imported already."""
    with ending():
        app()


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress: results, and what went wrong.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an unexpected error.")] = False,
) -> None:
    """Compress neural networks as tensor networks, and count every byte."""
    debugging["traceback"] = debug
    quieted["progress"] = quiet


@plain_errors
def evaluate(
    model: AnyModel,
    reference: Annotated[str | None, typer.Option(help="Model to compare with.")] = None,
    text: Annotated[Path | None, typer.Option(help="Text file; held-out articles of the bundled sample by default.")] = None,
    windows: Annotated[int, typer.Option(help="Number of windows.", min=1)] = 16,
    length: Length = 512,
    suite: Annotated[
        bool, typer.Option("--suite", help="Also three held-out domains, last words, English agreement and rare words.")
    ] = False,
    tasks: Annotated[
        list[str] | None, typer.Option("--tasks", help="Tasks of lm-eval, by commas: names, or files FILE.yaml.")
    ] = None,
    task_limit: Annotated[int | None, typer.Option(help="Only so many items of each task.", min=1)] = None,
    kv_bits: KvBits = None,
    kv_mode: KvMode = "live",
    kv_profile: KvProfile = None,
    dtype: Dtype = "auto",
    trust_remote_code: TrustRemoteCode = False,
    json: JsonFile = None,
) -> None:
    """Perplexity of MODEL, and divergence from --reference, on held-out text; with --suite also what it still knows, with
    --tasks what lm-eval measures, with --kv-bits what a compressed cache changes against MODEL with an exact cache."""
    from tensornet_compress.compressing import model_nbytes
    from tensornet_compress.evaluate import Reference, Suite, evaluate_cache, evaluate_language
    from tensornet_compress.inputs import domain_windows, heldout_windows, zero_shot_sets
    from tensornet_compress.integrations.lm_eval_tasks import find_tasks, run_tasks

    check_cache_options(kv_bits, kv_mode, kv_profile)
    if task_limit is not None and not tasks:
        raise TensorNetError("--task-limit belongs to --tasks; give both or leave it out")
    chosen = find_tasks([name for some in tasks for name in some.split(",")]) if tasks else None
    check_json(json, model, reference)
    profile = find_profile(model, kv_profile) if kv_bits is not None else None
    tokenizer = load_any_tokenizer(model, trust_remote_code)
    ids = heldout_windows(tokenizer, length, windows) if text is None else text_windows(tokenizer, text, length, windows)
    progress = RichProgress()
    steps = -(-len(ids) // 4)
    known = None
    asked = Suite(domain_windows(tokenizer, length, min(windows, 4)), **zero_shot_sets()) if suite else None
    answered = None
    if reference is not None:
        check_vocabularies(model, reference, trust_remote_code)
        original = load_any(reference, dtype, trust_remote_code)
        with progress.stage("reference", steps) as advance:
            known = Reference(original, ids, advance=advance)
        answered = None if asked is None else asked.reference(original)
        del original
    loaded = load_any(model, dtype, trust_remote_code)
    with progress.stage("evaluate", steps) as advance:
        quality = evaluate_language(loaded, ids, known, advance=advance)
    result = {"model": model, "reference": reference, "nbytes": model_nbytes(loaded)} | quality.model_dump()
    if asked is not None:
        with progress.stage("suite", asked.steps) as advance:
            result |= asked.measure(loaded, tokenizer, answered, advance)
    if chosen is not None:
        result |= run_tasks(loaded, tokenizer, chosen, task_limit)
    if kv_bits is not None:
        with progress.stage("cache", len(ids)) as advance:
            cache = evaluate_cache(loaded, ids, kv_bits, kv_mode, profile, advance)
        result |= {f"kv_{name}": value for name, value in cache.items()}
        result["kv_profile_nbytes"] = 0 if profile is None else profile.nbytes
    print_figures(result)
    write_json(json, result)


@plain_errors
def generate(
    model: AnyModel,
    prompt: Annotated[str, typer.Option(help="Text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to add.", min=1)] = 40,
    kv_bits: KvBits = None,
    kv_mode: KvMode = "live",
    kv_profile: KvProfile = None,
    dtype: Dtype = "auto",
    trust_remote_code: TrustRemoteCode = False,
    json: JsonFile = None,
) -> None:
    """Continue a prompt greedily; with --kv-bits through a compressed cache, whose bytes go to stderr."""
    check_cache_options(kv_bits, kv_mode, kv_profile)
    check_json(json, model)
    if not prompt.strip():
        raise TensorNetError("the prompt is empty; give some text to continue")
    profile = find_profile(model, kv_profile) if kv_bits is not None else None
    tokenizer = load_any_tokenizer(model, trust_remote_code)
    loaded = load_any(model, dtype, trust_remote_code)
    result: dict[str, Any] = {"model": model, "prompt": prompt}
    with RichProgress().stage("generate", max_new_tokens) as advance, ExitStack() as stack:
        if kv_bits is not None:
            from tensornet_compress.kv.context import compressed

            caches = stack.enter_context(compressed(loaded, bits=kv_bits, mode=kv_mode, profile=profile))  # type: ignore[arg-type]
        result["text"] = continue_text(loaded, tokenizer, prompt, max_new_tokens, advance)
    typer.echo(result["text"])
    if kv_bits is not None:
        bytes_of_cache = caches[-1].report()
        typer.echo(f"KV cache: {bytes_of_cache}", err=True)
        if not bytes_of_cache.sealed_tokens:
            typer.echo(
                f"note: nothing was compressed yet; a block of {caches[-1].block} tokens is sealed once {caches[-1].window} "
                "newer ones follow it",
                err=True,
            )
        result["kv"] = asdict(bytes_of_cache) | {"nbytes": bytes_of_cache.nbytes}
    write_json(json, result)


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
    if int(ids["input_ids"].max()) >= model.config.get_text_config().vocab_size:
        raise TensorNetError("the tokenizer gives ids outside the model's vocabulary; they do not belong together")
    # One greedy continuation, whatever the model's own settings ask for.
    options: dict[str, Any] = {"do_sample": False, "num_beams": 1, "num_return_sequences": 1, "max_time": None}
    options |= {"return_dict_in_generate": False, "cache_implementation": None, "pad_token_id": tokenizer.eos_token_id}
    options["stopping_criteria"] = [after_token]
    with torch.no_grad(), decoded(model):
        out = model.generate(**ids, max_new_tokens=max_new_tokens, **options)
    text: str = tokenizer.decode(out[0], skip_special_tokens=True)
    return text


@plain_errors
def inspect(
    out: Annotated[Path, typer.Argument(help="A folder written by this tool.")],
    all_layers: Annotated[bool, typer.Option("--all", help="Every layer, not only totals per kind of layer.")] = False,
    json: JsonFile = None,
) -> None:
    """Per layer: network, bytes in the file and in memory, error and share of the budget; the ledger adds up to the file."""
    from tensornet_compress.evaluate.ledger import folder_ledger

    check_json(json, out)
    ledger = folder_ledger(out)
    table = Table("layer", "network", "bytes", "in memory", "bits/weight", "error", "share", title=str(out))
    for row in ledger.layers if all_layers else ledger.by_kind():
        error = "" if row.error is None else f"{row.error:.3g}"
        network = f"{row.family}: {row.network}" if row.family and all_layers else row.network
        sizes = f"{row.nbytes:,}", f"{row.resident_nbytes:,}", f"{row.bits_per_weight:.3f}"
        table.add_row(row.name, network, *sizes, error, f"{row.share:.1%}")
    stored, resident = (sum(getattr(row, size) for row in ledger.layers) for size in ("nbytes", "resident_nbytes"))
    table.add_row("all", "", f"{stored:,}", f"{resident:,}", "", "", "")
    totals = Table("part of the folder", "bytes")
    for name, value in ledger.totals().items():
        totals.add_row(name, f"{value:,}")
    console().print(table, totals)
    write_json(json, ledger.model_dump(mode="json") | {"totals": ledger.totals()})


app.command()(weights)
app.command(name="eval")(evaluate)
for command in (generate, inspect, kv, search, export, report):
    app.command()(command)
app.add_typer(bench_app, name="bench")
