"""From a folder of safetensors to a compressed one, whatever its size, and however often the machine is switched off."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tensornet_compress.calibrate import Batch
from tensornet_compress.calibrate.batches import calibration_fingerprint, named_parts
from tensornet_compress.calibrate.blocks import block_list
from tensornet_compress.calibrate.fisher_metrics import in_groups
from tensornet_compress.calibrate.lending import usable_device
from tensornet_compress.calibrate.shared_sweeps import Elsewhere, swept_elsewhere
from tensornet_compress.compressing import Budget, compress
from tensornet_compress.compressing.cluster import cluster as on_cluster
from tensornet_compress.compressing.cluster import cluster_kind
from tensornet_compress.compressing.jobs import Job
from tensornet_compress.compressing.report import CompressionReport
from tensornet_compress.compressing.sizes import Sizes
from tensornet_compress.compressing.workers import JobRoom, limited_room, run_jobs
from tensornet_compress.errors import CheckpointError, TensorNetError
from tensornet_compress.files import MANIFEST, save
from tensornet_compress.files.index import files_state
from tensornet_compress.files.save import check_place
from tensornet_compress.files.shards import LARGEST
from tensornet_compress.files.steps import drop_finished, resumed
from tensornet_compress.files.whole import check_folder
from tensornet_compress.inputs import hub_source, load_encoder, load_model, resolve_model
from tensornet_compress.memory import peak_of_all, resident_bytes
from tensornet_compress.metric import StoredMetric
from tensornet_compress.nn import Target, find_targets, layer_weight, undecoded
from tensornet_compress.version import __version__

# Bytes beside the model (measured): of a process that has read its libraries, for each number of the layer that a job works on
# and of one with large moments, and for each logit of a batch.
_WORKER, _JOB, _WORK, _LOGIT = 400 << 20, 30, 12, 12
_SLACK = 64 << 20


def compress_folder(
    source: str | Path,
    target: str | Path,
    budget: Budget,
    calibration: Iterable[Batch],
    *,
    tokenizer: Any = None,
    encoder: bool = False,
    dtype: torch.dtype | None = None,
    memory: int | None = None,
    workers: int | None = None,
    cluster: str | None = None,
    overwrite: bool = False,
    fresh: bool = False,
    trust_remote_code: bool = False,
    revision: str | None = None,
    max_shard_nbytes: int = LARGEST,
    **options: Any,
) -> CompressionReport:
    """Compress the transformers model in the folder ``source`` into the folder ``target``.

    Weights stay in their files and are read when they are needed; activations and statistics of one block at a time are in
    memory, everything else lies in ``.NAME.tnc-work`` beside the target. A run that ended early, by an error or by the power
    going off, goes on where it was when the same call is made again. The target appears at the end, whole.

    Args:
        source: a folder, a hub id or the name of an embedded model.
        budget, workers: as for ``compress``; so are the ``options``.
        calibration: batches of token ids (rows, length): one row each needs the least memory.
        tokenizer: saved beside the model.
        encoder: load the model without a head.
        dtype: None for the one that is stored; another one needs memory for a converted copy of the model.
        memory: bytes that this process, and processes of this machine that it starts with ``cluster="processes"``, may take
            together. Jobs wait for each other to stay within.
        cluster: where jobs run: ``ray``, ``ray://HOST:PORT``, ``dask``, ``dask://HOST:PORT``, or ``processes`` of this machine
            in place of threads. Its machines must see ``source`` and ``target`` under the same paths. Results do not depend on
            it.
        overwrite: replace what an earlier run wrote to ``target``.
        fresh: start over, whatever an earlier run has done.
        trust_remote_code: run code that lies beside the weights.
        max_shard_nbytes: bytes of tensors in one file of the target; more are written to several, with an index.
        revision: of a hub id, a branch, tag or commit; what it was at the time is written to the report and the manifest.

    Raises:
        BudgetError, TargetError: as ``compress``.
        TensorNetError: ``memory``, or the room on the disk, does not suffice (the message says what would), an earlier run had
            other settings, another process writes ``target``, or any other bad input.

    >>> import torch, transformers, tensornet_compress as tnc
    >>> config = transformers.LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
    ...     num_attention_heads=2)
    >>> transformers.LlamaForCausalLM(config).save_pretrained("large")
    >>> batches = [torch.randint(64, (1, 16)) for _ in range(4)]
    >>> report = tnc.compress_folder("large", "small", tnc.Budget(bits_per_weight=4.5), batches, workers=1)
    >>> report.bits_per_weight <= 4.5, type(tnc.load("small")).__name__
    (True, 'LlamaForCausalLM')
    """
    batches = list(calibration)
    try:
        check_place(target, overwrite)
    except CheckpointError:
        if (Path(target) / MANIFEST).is_file():
            drop_finished(target, Path(target) / MANIFEST)
        raise
    usable_device(options.get("device"))
    folder = Path(resolve_model(source, revision))
    settings = {
        "version": f"{__version__}, torch {torch.__version__}",
        "threads": torch.get_num_threads(),
        "model": files_state(folder),
        "calibration": calibration_fingerprint(batches),
        "budget": str(budget),
        "dtype": str(dtype),
        "encoder": encoder,
        "options": {name: _plain(value) for name, value in options.items() if name != "progress"},
    }
    with resumed(target, settings, fresh) as steps:
        loader = load_encoder if encoder else load_model
        model = loader(folder, dtype, trust_remote_code)
        chosen = find_targets(model, options.get("targets"), options.get("ignore", ()), tables=True)[0]
        sizes = Sizes.of(model, chosen, budget)
        # Machines of a cluster, unlike processes of this one, share the sweeps as well, where there is room for their sums.
        shared = cluster is not None and cluster_kind(cluster)[0] != "processes"
        check_folder(target, room_needed(model, batches, chosen, sizes))
        short = ""
        if shared:
            try:
                check_folder(target, room_needed(model, batches, chosen, sizes, by_groups=True))
            except TensorNetError as error:
                short = f"the sweeps stayed on this machine: to share them, {error}"
        room = None
        if memory is not None:
            left = room_within(memory, model, batches, sizes)
            room = JobRoom(left, _job_bytes)
            if cluster == "processes":
                fitting = left // (_WORKER + _JOB * max(sizes.weights.values()))
                workers = max(1, min(workers or torch.get_num_threads(), fitting))
        options = {"by_block": True, "source": folder if dtype is None else None} | options
        elsewhere = Elsewhere(partial(loader, folder, dtype, trust_remote_code), run_jobs) if shared and not short else None
        with on_cluster(cluster), undecoded(), limited_room(room), swept_elsewhere(elsewhere):
            report = compress(model, budget, batches, workers=workers, steps=steps, **options)
        if short:
            report = report.model_copy(update={"notes": (*report.notes, short)})
        taken = peak_of_all()
        if memory is not None and taken is not None and taken > memory:
            note = f"{taken >> 20:,} MiB of memory were taken, more than the {memory >> 20:,} MiB that were allowed"
            report = report.model_copy(update={"notes": (*report.notes, note)})
        report = report.model_copy(update={"source": hub_source(folder)})
        save(model, target, tokenizer, report, overwrite=overwrite, max_shard_nbytes=max_shard_nbytes)
    return report


def room_needed(
    model: nn.Module, batches: Sequence[Batch], chosen: Sequence[Target], sizes: Sizes, by_groups: bool = False
) -> int:
    """Bytes on disk that a compression needs at most: what enters each block, second moments (``by_groups``: of each group of
    batches too), networks of two rounds, and the result."""
    config: Any = getattr(model, "config", None)
    width = getattr(getattr(config, "get_text_config", lambda: config)(), "hidden_size", 0)
    blocks = block_list(model, [target.name for target in chosen])
    tokens = sum(max((part.numel() for part in _tensors(batch)), default=0) for batch in batches)
    states = (len(blocks) + 2) * tokens * width * next(model.parameters()).element_size()
    inputs = (layer_weight(model.get_submodule(target.name))[0].numel() for target in chosen)
    copies = 1 + (len(list(in_groups(batches))) if by_groups else 0)
    return states + copies * sum(8 * n * n for n in inputs) + 3 * sizes.allowed


def _tensors(batch: Batch) -> list[torch.Tensor]:
    return [part for part in named_parts(batch).values() if isinstance(part, torch.Tensor)]


def room_within(memory: int, model: nn.Module, batches: Iterable[Batch], sizes: Sizes) -> int:
    """What ``memory`` leaves for jobs.

    Raises:
        TensorNetError: not enough for one.
    """
    largest = max(sizes.weights.values())
    logits = max((part.numel() for batch in batches for part in _tensors(batch)), default=0) * int(
        getattr(model.config, "vocab_size", 0)
    )
    here = (resident_bytes() or 0) + sizes.allowed + _SLACK
    least = here + max(_LOGIT * logits + 4 * largest, _JOB * largest)
    if least > memory:
        raise TensorNetError(
            f"{memory:,} bytes of memory do not suffice for this model; give at least {least:,} "
            f"({-(-least // 2**20):,}MiB), or shorter calibration windows"
        )
    return memory - here


def _job_bytes(task: tuple[Job, Any]) -> int:
    """What a job takes: its largest layer, or the second moment of its inputs with what is made of that."""
    job = task[0]
    metric = job.layers[0].metric
    moment = metric.columns.stat().st_size if isinstance(metric, StoredMetric) and metric.columns is not None else 0
    largest = max(layer.source.numel for layer in job.layers)
    return max(_JOB * largest, _WORK * largest + 4 * moment)


def _plain(value: Any) -> Any:
    if isinstance(value, torch.device):
        return str(value)
    return value if isinstance(value, str | int | float | bool | None) else [str(part) for part in value]
