"""The ``kv`` command, and the options of caches of ``generate`` and ``eval``."""

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

from tensornet_compress.calibrate.batches import calibration_fingerprint
from tensornet_compress.cli.common import (
    AnyModel,
    Calibration,
    JsonFile,
    RichProgress,
    TrustRemoteCode,
    check_json,
    console,
    invocation,
    load_any,
    load_any_tokenizer,
    print_figures,
    text_windows,
    write_json,
    writes,
)
from tensornet_compress.cli.ending import plain_errors
from tensornet_compress.cli.report import leave_report
from tensornet_compress.errors import TensorNetError
from tensornet_compress.evaluate import evaluate_cache
from tensornet_compress.files import MANIFEST
from tensornet_compress.files.hashes import file_digest
from tensornet_compress.files.index import files_state, weight_files
from tensornet_compress.files.steps import resumed
from tensornet_compress.version import __version__

if TYPE_CHECKING:
    from tensornet_compress.kv.planning import CacheCost
    from tensornet_compress.kv.profile.profile import Profile

CacheMetric = Literal["fisher", "queries", "euclidean"]
KvMode = Annotated[str, typer.Option(help="live or storage: the kind of compressed cache.")]
KvProfile = Annotated[Path | None, typer.Option(help="Profile folder of the `kv` command; MODEL/kv_profile if there is one.")]
PROFILE_FOLDER = "kv_profile"
_FRONT_TOKENS = 4096
_LEAST_LENGTH = 256


def profile_place(model: str, out: Path | None) -> Path:
    """Where a profile goes: ``out``, else into the model's folder.

    Raises:
        TensorNetError: the model is no folder.
    """
    if out is None and not Path(model).is_dir():
        raise TensorNetError(f"{model!r} is not a folder, so the profile has no place in it; give --out FOLDER")
    return out or Path(model) / PROFILE_FOLDER


@plain_errors
@writes(lambda given: profile_place(given["model"], given["out"]))
def kv(
    model: AnyModel,
    bits: Annotated[float, typer.Option(help="Payload bits per key/value element to report on.")] = 2.0,
    calibration: Calibration = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the profile; MODEL/kv_profile by default.")] = None,
    samples: Annotated[int, typer.Option(help="Calibration windows.", min=5)] = 44,
    length: Annotated[int, typer.Option(help="Tokens per window.", min=_LEAST_LENGTH)] = 1152,
    sensitivity_windows: Annotated[int, typer.Option(help="Windows with backward passes, the slow part.", min=1)] = 32,
    metric: Annotated[
        str, typer.Option(help="What weighs errors: fisher, queries (no backward pass) or euclidean.")
    ] = "fisher",
    mode: Annotated[str, typer.Option(help="live or storage: the cache to report on.")] = "storage",
    overwrite: Annotated[bool, typer.Option(help="Replace a profile that is there.")] = False,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Start over; by default a calibration that ended early goes on where it was.")
    ] = False,
    trust_remote_code: TrustRemoteCode = False,
    json: JsonFile = None,
) -> None:
    """Calibrate MODEL's KV cache, write the profile, and report quality and bytes of a cache at --bits."""
    from tensornet_compress.kv.planning import costs, front
    from tensornet_compress.kv.profile.calibrate import calibrate
    from tensornet_compress.report.from_kv import kv_result

    check_cache_options(bits, mode, None)
    known_metric = cache_metric(metric)
    out = profile_place(model, out)
    if any((out / name).exists() for name in ("config.json", MANIFEST)):
        raise TensorNetError(
            f"{str(out)!r} is a model's folder; give a profile one of its own, such as {str(out / PROFILE_FOLDER)!r}"
        )
    held = [name for name in ("profile.json", "report.json", "report.html") if (out / name).exists()]
    if held and not overwrite:
        raise TensorNetError(f"{str(out)!r} holds {held[0]!r}; choose another --out, or pass --overwrite")
    check_json(json, model)
    tokenizer = load_any_tokenizer(model, trust_remote_code)
    loaded = load_any(model, trust=trust_remote_code)
    windows, tests = _windows(tokenizer, calibration, length, samples)
    progress = RichProgress()
    settings = {
        "version": f"{__version__}, torch {torch.__version__}",
        "model": files_state(Path(model)) if Path(model).is_dir() else model,
        "calibration": calibration_fingerprint(list(windows)),
        "sensitivity_windows": sensitivity_windows,
        "metric": metric,
    }
    with resumed(out, settings, fresh) as steps:
        with progress.stage("calibrate", len(windows)) as advance:
            counting = counted(windows, advance)
            profile = calibrate(loaded, counting, metric=known_metric, sensitivity_windows=sensitivity_windows, steps=steps)
        profile.save(out, fingerprint(model))
    channels = max(tree.mean.numel() for tree in profile.trees.values())
    if profile.spec.calibration_tokens < channels:
        typer.echo(
            f"note: the bases were learned from {profile.spec.calibration_tokens} tokens, fewer than the {channels} channels "
            "that one token caches on a side; use more or longer windows",
            err=True,
        )
    with progress.stage("evaluate", len(tests)) as advance:
        quality = evaluate_cache(loaded, tests, bits, mode, profile, advance)
    share = profile.nbytes / sum(p.nbytes for p in loaded.parameters())
    result = {"model": model, "profile": str(out), "profile_nbytes": profile.nbytes, "profile_share_of_model": share}
    result |= {"mode": mode, "bits": bits} | quality
    kinds = front(costs(loaded, profile, _FRONT_TOKENS))
    print_figures(result)
    typer.echo("profile_nbytes: all that is stored, for both modes and every rate; a cache holds the part that it uses")
    console().print(_front_table(kinds))
    write_json(json, result | {"front": [asdict(cost) for cost in kinds]})
    leave_report(kv_result(model, [quality | {"mode": mode, "bits": bits}], profile, kinds, invocation()), out)


def _windows(tokenizer: Any, file: Path | None, length: int, samples: int) -> tuple[Tensor, Tensor]:
    """Windows to calibrate on and to evaluate on."""
    from tensornet_compress.inputs import calibration_windows, heldout_windows

    if file is None:
        return calibration_windows(tokenizer, length, samples), heldout_windows(tokenizer, length, 4)
    # The last windows of the caller's own text stay unseen, so that the report is honest.
    windows = text_windows(tokenizer, file, length, samples + 2)
    if len(windows) < 7:
        raise TensorNetError(f"{str(file)!r} holds {len(windows)} windows of {length} tokens; 7 are needed")
    return windows[:-2], windows[-2:]


def cache_metric(name: str) -> CacheMetric:
    """A metric of ``calibrate`` by name.

    Raises:
        TensorNetError: there is none of that name.
    """
    known: CacheMetric | None = next((metric for metric in get_args(CacheMetric) if metric == name), None)
    if known is None:
        raise TensorNetError(f"unknown metric {name!r}; choose from {', '.join(get_args(CacheMetric))}")
    return known


def _front_table(kinds: Sequence[CacheCost]) -> Table:
    table = Table("cache", "bits", "held bytes", "working bytes", "multiply-adds a step", "to thaw", "expected error")
    table.title = f"Kinds of cache for {_FRONT_TOKENS} tokens, as predicted; no kind beats another in everything"
    for cost in kinds:
        counts = (cost.held_nbytes, cost.working_nbytes, cost.step_multiply_adds, cost.thaw_multiply_adds)
        numbers = (f"{count:,}" for count in counts)
        table.add_row(f"{cost.mode}, {cost.attention}", f"{cost.bits:g}", *numbers, f"{cost.error:.3g}")
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
    most = 8 if mode == "live" else 12
    if not 0.05 <= bits <= most:
        raise TensorNetError(f"asked for {bits:g} bits per key/value element; a {mode} cache takes 0.05 to {most}")


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
    if not beside.is_dir():
        return None
    profile = Profile.load(beside)
    if profile.spec.model not in ("", fingerprint(model)):
        raise TensorNetError(
            f"{str(beside)!r} was made for other weights than those in {model!r}; make it anew with `tensornet-compress kv "
            f"{shlex.quote(model)} --overwrite`, or name it with --kv-profile to use it all the same"
        )
    return profile


def fingerprint(model: str) -> str:
    """Of the files of a model's weights, whatever they are called; empty for what is no folder."""
    files = sorted({*weight_files(model).values()}) if Path(model).is_dir() else []
    return " ".join(map(file_digest, files))
