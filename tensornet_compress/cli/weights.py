"""The ``weights`` command: compress a model into a folder."""

from __future__ import annotations

from math import isfinite
from pathlib import Path
from typing import Annotated, Any

import typer

from tensornet_compress.calibrate.layer_metrics import LAYER_METRICS
from tensornet_compress.cli.common import (
    DTYPES,
    Calibration,
    Dtype,
    JsonFile,
    Length,
    RichProgress,
    TrustRemoteCode,
    check_dtype,
    check_json,
    invocation,
    load_any_tokenizer,
    text_windows,
    write_json,
    writes,
)
from tensornet_compress.cli.ending import plain_errors
from tensornet_compress.cli.report import leave_report
from tensornet_compress.compressing import Budget
from tensornet_compress.errors import TensorNetError

_METRICS = ("auto", *(name for name in LAYER_METRICS if name != "elementwise"))
_MOST = 1e18
_UNITS = {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "KB": 10**3, "MB": 10**6, "GB": 10**9, "B": 1, "": 1}


@plain_errors
@writes(lambda given: Path(given["out"]))
def weights(
    model: Annotated[str, typer.Argument(help="Model folder, hub id, or smollm2-135m / all-minilm-l6-v2.")],
    out: Annotated[Path, typer.Argument(help="Folder to write.")],
    bits_per_weight: Annotated[float | None, typer.Option(help="Stored bits per weight of the targeted modules.")] = None,
    ratio: Annotated[float | None, typer.Option(help="Stored bytes of the whole model / original bytes.")] = None,
    size: Annotated[str | None, typer.Option(help="Stored bytes of the whole model, e.g. 90MB or 120000000.")] = None,
    targets: Annotated[list[str] | None, typer.Option(help="Patterns of modules to compress (repeatable).")] = None,
    ignore: Annotated[list[str] | None, typer.Option(help="Patterns of modules to leave alone (repeatable).")] = None,
    method: Annotated[
        str,
        typer.Option(help="auto, coded, dense, svd, residual, tt, ttm, tree, searched or sorted."),
    ] = "auto",
    format: Annotated[list[str] | None, typer.Option(help="Number formats allowed, e.g. bf16, int4g64z (repeatable).")] = None,  # noqa: A002
    allocator: Annotated[str, typer.Option(help="sensitivity, energy or uniform.")] = "sensitivity",
    metric: Annotated[
        str,
        typer.Option(help="fisher, euclidean, diagonal, input, row-fisher, kronecker, or auto (least held-out divergence)."),
    ] = "fisher",
    refine: Annotated[bool, typer.Option("--refine", help="Fit behind the compressed prefix, then block by block.")] = False,
    isvt: Annotated[bool, typer.Option("--isvt", help="Lower ranks (bf16) by iterative singular value thresholding.")] = False,
    heal: Annotated[int, typer.Option(help="Steps of distillation from the original afterwards.", min=0)] = 0,
    effort: Annotated[
        str, typer.Option(help="fast, default, or max (layers are fitted behind the compressed ones before them).")
    ] = "default",
    calibration: Calibration = None,
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
        bool | None,
        typer.Option(
            "--by-block/--at-once",
            help="Hold the activations and statistics of one block at a time; so by default with the fisher metric.",
        ),
    ] = None,
    workers: Annotated[
        int | None, typer.Option(help="Threads (with --cluster processes, processes); as many as processors by default.", min=1)
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option(help="Memory that the run may take in all, e.g. 4GiB; jobs wait for each other to stay within."),
    ] = None,
    cluster: Annotated[
        str | None, typer.Option(help="processes, ray, ray://HOST:PORT, dask or dask://HOST:PORT; all machines see one folder.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="Where calibration runs, block by block, e.g. cuda.")] = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Start over; by default a run that ended early goes on where it was.")
    ] = False,
    overwrite: Annotated[bool, typer.Option(help="Replace OUT if it exists; files of your own in it stay.")] = False,
    trust_remote_code: TrustRemoteCode = False,
    shard_size: Annotated[str, typer.Option(help="Bytes of tensors in one file of OUT, e.g. 2GB.")] = "5GB",
    revision: Annotated[str | None, typer.Option(help="Of a hub id: a branch, tag or commit.")] = None,
    json: JsonFile = None,
) -> None:
    """Compress the weights of MODEL into the folder OUT."""
    from tensornet_compress.files import MANIFEST, load_plan, save
    from tensornet_compress.files.save import check_place
    from tensornet_compress.inputs import (
        calibration_windows,
        load_causal_lm,
        load_encoder,
        model_kind,
        require_text,
        resolve_model,
    )
    from tensornet_compress.integrations.folders import compress_folder
    from tensornet_compress.nn.plan import PLAN_ATTRIBUTE
    from tensornet_compress.report.from_weights import weights_result

    budget = given_budget(bits_per_weight, ratio, size)
    shard_nbytes = parse_size(shard_size, "--shard-size") or 0
    if shard_nbytes < 1:
        raise TensorNetError(f"--shard-size must be positive, was given {shard_size}")
    check_json(json, model)
    if Path(model).exists() and out.resolve().is_relative_to(Path(model).resolve()):
        raise TensorNetError(f"{str(out)!r} is the model {model!r} itself or lies in it; choose another folder")
    check_place(out, overwrite, budget.nbytes or 0)
    check_dtype(dtype)
    if metric not in _METRICS:
        raise TensorNetError(f"unknown metric {metric!r}; choose one of {', '.join(_METRICS)}")
    others = method != "auto" or format or allocator != "sensitivity" or search is not None or by_block or effort != "default"
    if isvt and (others or refine or metric == "auto"):
        raise TensorNetError(
            "--isvt lowers ranks of two bf16 cores of each layer by itself; leave out --method, --format, --allocator, "
            "--search, --by-block, --effort, --refine and --metric auto"
        )
    if (Path(model) / MANIFEST).is_file():
        raise TensorNetError(f"{model!r} is compressed already; give the original model")
    named, model = model, resolve_model(model, revision)
    require_text(model, trust_remote_code)
    tokenizer = load_any_tokenizer(model, trust_remote_code)
    headless = encoder or model_kind(model, trust_remote_code) == "encoder"
    if calibration is None:
        windows = calibration_windows(tokenizer, length, samples)
    else:
        windows = text_windows(tokenizer, calibration, length, samples)
    which: dict[str, Any] = {"targets": targets, "ignore": ignore or (), "metric": metric, "progress": RichProgress()}
    how: dict[str, Any] = {"method": method, "formats": format, "allocator": allocator, "workers": workers, "search": search}
    how |= {"by_block": metric == "fisher" if by_block is None else by_block, "effort": effort}
    plan = None
    if isvt or refine or heal or metric == "auto":
        from tensornet_compress.train import Schedule, compress_in_stages

        if memory is not None or fresh or cluster is not None or device is not None:
            raise TensorNetError(
                "--isvt, --refine, --heal and --metric auto run in one piece; leave out --memory, --cluster, --device and "
                "--fresh"
            )
        loaded = (load_encoder if headless else load_causal_lm)(model, DTYPES[dtype], trust_remote_code)
        # Stages need batches for three uses.
        batches = windows.split(max(1, min(4, samples // 3)))
        stages: dict[str, Any] = {"refine": refine, "heal_steps": heal}
        stages |= {"rank_schedule": Schedule()} if isvt else how | {"source": Path(model) if dtype == "auto" else None}
        report = compress_in_stages(loaded, budget, list(batches), **which, **stages)
        save(loaded, out, tokenizer, report, overwrite=overwrite, max_shard_nbytes=shard_nbytes)
        plan = getattr(loaded, PLAN_ATTRIBUTE, None)
    else:
        report = compress_folder(
            model,
            out,
            budget,
            list(windows.split(1)),
            tokenizer=tokenizer,
            encoder=headless,
            dtype=DTYPES[dtype],
            memory=parse_size(memory, "--memory"),
            cluster=cluster,
            device=device,
            overwrite=overwrite,
            fresh=fresh,
            trust_remote_code=trust_remote_code,
            max_shard_nbytes=shard_nbytes,
            **which,
            **how,
        )
        plan = load_plan(out)
    typer.echo(str(report))
    held = folder_nbytes(out)
    leave_report(weights_result(report, plan, named, invocation()), out)
    whole = folder_nbytes(out)
    typer.echo(f"saved to {out} ({whole:,} bytes on disk: the model {held:,}, its report {whole - held:,})")
    sizes = {"folder_nbytes": whole, "model_files_nbytes": held}
    write_json(json, report.model_dump(mode="json") | {"summary": report.summary()} | sizes)


def folder_nbytes(folder: Path) -> int:
    """Bytes of all files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def given_budget(bits_per_weight: float | None, ratio: float | None, size: str | None) -> Budget:
    """The budget of exactly one option.

    Raises:
        TensorNetError: none or several were given, or what is no positive number.
    """
    options = {"--bits-per-weight": bits_per_weight, "--ratio": ratio, "--size": size}
    given = {name: value for name, value in options.items() if value is not None}
    if len(given) != 1:
        said = " and ".join(f"{name} {value}" for name, value in given.items()) or "none"
        raise TensorNetError(f"give exactly one of {', '.join(options)}; was given {said}")
    nbytes = parse_size(size)
    ((name, value),) = given.items()
    number = nbytes if nbytes is not None else float(value)
    if not (isfinite(number) and 0 < number < _MOST):
        raise TensorNetError(f"{name} must be positive and finite, was given {value}")
    return Budget(bits_per_weight=bits_per_weight, ratio=ratio, nbytes=nbytes)


def parse_size(text: str | None, option: str = "--size") -> int | None:
    """``90MB``, ``1.2GB``, ``512KiB`` or plain bytes -> bytes."""
    if text is None:
        return None
    number = text.strip().upper()
    unit = next(unit for unit in _UNITS if number.endswith(unit))
    try:
        return int(float(number.removesuffix(unit)) * _UNITS[unit])
    except (ValueError, OverflowError):
        raise TensorNetError(
            f"{option} {text!r} is not a size; use bytes or a number with KB, MB, GB, KiB, MiB or GiB"
        ) from None
