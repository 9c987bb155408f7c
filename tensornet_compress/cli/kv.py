"""The ``kv`` command, and what ``generate --kv-bits`` and ``eval --kv-bits`` do."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

import torch
import typer
from rich.table import Table
from torch import Tensor

from tensornet_compress.cli.common import console, figure, load_any, load_any_tokenizer, plain_errors, text_windows, write_json
from tensornet_compress.cli.progress import RichProgress
from tensornet_compress.cli.report import invocation, leave_report
from tensornet_compress.errors import TensorNetError

if TYPE_CHECKING:
    from tensornet_compress.kv.cache import CompressedCache
    from tensornet_compress.kv.planning import CacheCost
    from tensornet_compress.kv.profile.profile import Profile

CacheMetric = Literal["fisher", "queries", "euclidean"]
PROFILE_FOLDER = "kv_profile"
_FRONT_TOKENS = 4096
_LEAST_LENGTH = 256


def register(app: typer.Typer) -> None:
    """Add the ``kv`` command to an app."""
    app.command(name="kv")(plain_errors(kv_command))


def kv_command(
    model: Annotated[str, typer.Argument(help="Model folder (compressed or not), hub id or embedded name.")],
    bits: Annotated[float, typer.Option(help="Payload bits per key/value element to report on.")] = 2.0,
    calibration: Annotated[Path | None, typer.Option(help="Text file; the bundled Wikipedia sample by default.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the profile; MODEL/kv_profile by default.")] = None,
    samples: Annotated[int, typer.Option(help="Calibration windows.", min=5)] = 44,
    length: Annotated[int, typer.Option(help="Tokens per window.", min=_LEAST_LENGTH)] = 1152,
    sensitivity_windows: Annotated[int, typer.Option(help="Windows with backward passes, the slow part.", min=1)] = 32,
    metric: Annotated[
        str, typer.Option(help="What weighs errors: fisher, queries (no backward pass) or euclidean.")
    ] = "fisher",
    mode: Annotated[str, typer.Option(help="live or storage: the cache to report on.")] = "storage",
    overwrite: Annotated[bool, typer.Option(help="Replace a profile that is there.")] = False,
    json: Annotated[Path | None, typer.Option("--json", help="Also write the result to this JSON file.")] = None,
) -> None:
    """Calibrate MODEL's KV cache, write the profile, and report quality and bytes of a cache at --bits."""
    from tensornet_compress.inputs import calibration_windows, heldout_windows
    from tensornet_compress.kv.planning import costs, front
    from tensornet_compress.kv.profile.calibrate import calibrate

    check_cache_options(bits, mode, None)
    cache_metric(metric)
    if out is None:
        if not Path(model).is_dir():
            raise TensorNetError(f"{model!r} is not a folder, so the profile has no place in it; give --out FOLDER")
        out = Path(model) / PROFILE_FOLDER
    if (out / "profile.json").exists() and not overwrite:
        raise TensorNetError(f"{str(out)!r} holds a profile; choose another --out, or pass --overwrite")
    tokenizer = load_any_tokenizer(model)
    loaded = load_any(model)
    if calibration is None:
        windows, tests = calibration_windows(tokenizer, length, samples), heldout_windows(tokenizer, length, 4)
    else:
        # The last windows of the caller's own text stay unseen, so that the report is honest.
        everything = text_windows(tokenizer, calibration, length, samples + 2)
        if len(everything) < 7:
            raise TensorNetError(f"{str(calibration)!r} holds {len(everything)} windows of {length} tokens; 7 are needed")
        windows, tests = everything[:-2], everything[-2:]
    progress = RichProgress()
    with progress.stage("calibrate", len(windows)) as advance:
        profile = calibrate(
            loaded, counted(windows, advance), metric=cache_metric(metric), sensitivity_windows=sensitivity_windows
        )
    profile.save(out)
    channels = max(tree.mean.numel() for tree in profile.trees.values())
    if profile.spec.calibration_tokens < channels:
        typer.echo(
            f"note: the bases were learned from {profile.spec.calibration_tokens} tokens, fewer than the {channels} channels "
            "that one token caches on a side; use more or longer windows",
            err=True,
        )
    with progress.stage("evaluate", len(tests)) as advance:
        quality = evaluate_cache(loaded, tests, bits, mode, profile, advance)
    result = {
        "model": model,
        "profile": str(out),
        "profile_nbytes": profile.nbytes,
        "profile_share_of_model": profile.nbytes / sum(p.nbytes for p in loaded.parameters()),
        "mode": mode,
        "bits": bits,
    } | quality
    kinds = front(costs(loaded, profile, _FRONT_TOKENS))
    result["front"] = [asdict(cost) for cost in kinds]
    table = Table("figure", "value")
    for name, value in result.items():
        if name != "front":
            table.add_row(name, figure(name, value))
    console().print(table)
    typer.echo("profile_nbytes: all that is stored, for both modes and every rate; a cache holds the part that it uses")
    console().print(_front_table(kinds))
    write_json(json, result)
    from tensornet_compress.report.from_kv import kv_result

    leave_report(kv_result(model, [quality | {"mode": mode, "bits": bits}], profile, kinds, invocation()), out)


def cache_metric(name: str) -> CacheMetric:
    """A metric of ``calibrate`` by name.

    Raises:
        TensorNetError: there is none of that name.
    """
    for known in get_args(CacheMetric):
        if name == known:
            found: CacheMetric = known
            return found
    raise TensorNetError(f"unknown metric {name!r}; choose from {', '.join(get_args(CacheMetric))}")


def _front_table(kinds: Sequence[CacheCost]) -> Table:
    table = Table("cache", "bits", "held bytes", "working bytes", "multiply-adds a step", "to thaw", "expected error")
    table.title = f"Kinds of cache for {_FRONT_TOKENS} tokens, as predicted; no kind beats another in everything"
    for cost in kinds:
        table.add_row(
            f"{cost.mode}, {cost.attention}",
            f"{cost.bits:g}",
            f"{cost.held_nbytes:,}",
            f"{cost.working_nbytes:,}",
            f"{cost.step_multiply_adds:,}",
            f"{cost.thaw_multiply_adds:,}",
            f"{cost.error:.3g}",
        )
    return table


def counted(windows: Tensor, advance: Callable[[], None]) -> Iterator[Tensor]:
    """Windows one by one, with progress."""
    for window in windows.split(1):
        yield window
        advance()


def check_cache_options(bits: float | None, mode: str, profile: Path | None) -> None:
    """Refuse impossible options of a cache before anything slow happens.

    Raises:
        TensorNetError: a rate or mode that no cache has, or options of a cache without a rate.
    """
    if bits is None:
        if profile is not None:
            raise TensorNetError("--kv-profile needs --kv-bits; without it the cache stays exact")
        return
    if mode not in ("live", "storage"):
        raise TensorNetError(f"mode must be 'live' or 'storage', was given {mode!r}")
    if not 0.05 <= bits <= 8:
        raise TensorNetError(f"asked for {bits:g} bits per key/value element; give 0.05 to 8")


def find_profile(model: str, folder: Path | None) -> Profile | None:
    """The profile in ``folder``, else the one beside the model; ``None`` when the model has none."""
    from tensornet_compress.kv.profile.profile import Profile

    if folder is not None:
        if not (folder / "profile.json").is_file():
            raise TensorNetError(
                f"no profile at {str(folder)!r}; make one with `tensornet-compress kv MODEL --out {shlex.quote(str(folder))}`"
            )
        return Profile.load(folder)
    beside = Path(model) / PROFILE_FOLDER
    return Profile.load(beside) if beside.is_dir() else None


@torch.no_grad()
def evaluate_cache(
    model: Any, windows: Tensor, bits: float, mode: str, profile: Profile | None, advance: Callable[[], None] = lambda: None
) -> dict[str, float]:
    """What a compressed cache costs on windows (count, tokens): the first seven eighths are cached, the rest is read.

    Returns mean KL to the exact cache and change of cross-entropy (nats a token), top-1 agreement, bits per element of the
    payload and of everything held, and bytes.
    """
    from transformers import DynamicCache

    from tensornet_compress.calibrate import kl_divergence
    from tensornet_compress.kv.cache import CompressedCache

    ahead = max(1, windows.shape[1] // 8)
    total: dict[str, float] = {}
    for ids in windows.split(1):
        context, following = ids[:, :-ahead], ids[:, -ahead:]
        cache: CompressedCache = CompressedCache(model, bits=bits, mode=mode, profile=profile)
        scores = []
        for past in (cache, DynamicCache(config=model.config)):
            model(context, past_key_values=past, use_cache=True)
            if past is cache:
                report = cache.report()
                if not report.sealed_tokens:
                    raise TensorNetError(
                        f"{context.shape[1]} cached tokens leave nothing to compress: blocks of {cache.block} are sealed "
                        f"behind a window of {cache.window}; use longer windows (--length)"
                    )
            scores.append(model(following, past_key_values=past, use_cache=True).logits[0].float().log_softmax(-1))
        got, exact = scores
        target = following[0, 1:, None]
        sealed = max(report.sealed_tokens, 1)
        elements = report.exact_nbytes / report.tokens / next(model.parameters()).element_size()
        row = {
            "kl": float(kl_divergence(exact, got).mean()),
            "dce": float((exact[:-1].gather(1, target) - got[:-1].gather(1, target)).mean()),
            "top1_agreement": float((got.argmax(-1) == exact.argmax(-1)).float().mean()),
            "payload_bits_per_element": 8 * report.payload_nbytes / (sealed * elements),
            "bits_per_element": report.bits_per_element,
            "nbytes": float(report.nbytes - report.working_nbytes),
            "exact_nbytes": float(report.exact_nbytes),
        }
        for name, value in row.items():
            total[name] = total.get(name, 0.0) + value / len(windows)
        advance()
    return total
