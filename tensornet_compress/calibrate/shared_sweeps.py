"""Both sweeps over a model made by workers: each group of batches is swept by one of them, whose sums come back in files."""

from __future__ import annotations

import os
import secrets
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from tensornet_compress.calibrate.batches import Batch
from tensornet_compress.calibrate.fisher_metrics import FisherCollector
from tensornet_compress.calibrate.sweeps import OUTSIDE, FisherSweeps
from tensornet_compress.errors import TensorNetError
from tensornet_compress.files.steps import Steps
from tensornet_compress.files.whole import locked, whole_file
from tensornet_compress.metric import StoredMetric
from tensornet_compress.nn import Target
from tensornet_compress.nn.splitting import split_for

_SWEEPING = threading.Lock()
Swept = dict[str, Any]
"""What a worker tells of a group: of each block, and of what lies behind and before them, how its file of sums is read."""


@dataclass(frozen=True)
class GroupSweep:
    """Both sweeps over one group of batches, wherever this is sent: all machines see the same folders."""

    load: Callable[[], nn.Module]
    batches: list[Batch]
    targets: Sequence[Target]
    folder: Path
    number: int
    threads: int
    precision: torch.dtype | None
    seed: int

    def __call__(self) -> Swept:
        """Write the group's sums to the folder, on as many threads as the process that asks has: numbers depend on that. So a
        machine makes one sweep at a time."""
        with _SWEEPING, locked(Path(tempfile.gettempdir()) / f"tensornet-sweep-{os.getuid()}", wait=True):
            before = torch.get_num_threads()
            torch.set_num_threads(self.threads)
            try:
                return self._written()
            finally:
                torch.set_num_threads(before)

    def _written(self) -> Swept:
        model = self.load()
        split_for(model, (name for target in self.targets for name in (target.name, *target.tied)))
        # A worker that was given up may still be at the same group.
        scratch = f"group-{self.number}-{secrets.token_hex(4)}-"
        sweeps = FisherSweeps(
            model, self.batches, self.targets, Steps(self.folder, lasting=False), precision=self.precision, seed=self.seed,
            group=self.number, scratch=scratch, proved=True,
        )  # fmt: skip
        told = {}
        for part, sums in sweeps.sums():
            with whole_file(sums_file(self.folder, part, self.number)) as file:
                told[part] = sums.write(file)
        for file in self.folder.glob(f"{scratch}*"):
            file.unlink()
        return told


def sums_file(folder: Path, part: str, group: int) -> Path:
    """Where the sums of a group of batches lie."""
    return folder / f"sums-{part}-{group}.safetensors"


class Elsewhere(NamedTuple):
    """Workers that see the same folders: how one gets the model, and how all are given tasks (``compressing.run_jobs``)."""

    load: Callable[[], nn.Module]
    run: Callable[..., Any]


_ELSEWHERE: ContextVar[Elsewhere | None] = ContextVar("workers for sweeps", default=None)


@contextmanager
def swept_elsewhere(workers: Elsewhere | None) -> Iterator[None]:
    """Inside, sweeps over several groups of batches are made by these workers."""
    token = _ELSEWHERE.set(workers)
    try:
        yield
    finally:
        _ELSEWHERE.reset(token)


def swept(sweeps: FisherSweeps) -> Iterator[tuple[str, StoredMetric]]:
    """``sweeps.metrics()``, by workers where there are some, and more than one group for them."""
    workers = _ELSEWHERE.get()
    if workers is None or len(sweeps.groups) == 1 or sweeps.lent_to is not None:
        yield from sweeps.metrics()
    else:
        yield from _gathered(sweeps, workers)


def _gathered(sweeps: FisherSweeps, workers: Elsewhere) -> Iterator[tuple[str, StoredMetric]]:
    """The same as ``sweeps.metrics()``, from sweeps of workers, each over one group."""
    threads = torch.get_num_threads()
    # The runner holds what enters the first block.
    sweeps.runner.states = []
    told: dict[int, Swept | None] = {group: sweeps.steps.found(f"sweep-{group}") for group in range(len(sweeps.groups))}
    waiting = [group for group, known in told.items() if known is None]
    tasks = [
        GroupSweep(
            workers.load, [sweeps.batches[batch] for batch in sweeps.groups[group]], sweeps.targets, sweeps.steps.folder, group,
            threads, sweeps.precision, sweeps.seed,
        )
        for group in waiting
    ]  # fmt: skip

    def advance(group: int) -> None:
        for _ in range(2 * len(sweeps.blocks) * len(sweeps.groups[group])):
            sweeps.advance()

    def receive(place: int, found: Swept) -> None:
        told[waiting[place]] = found
        files = [sums_file(sweeps.steps.folder, part, waiting[place]) for part in found]
        sweeps.steps.finish(f"sweep-{waiting[place]}", found, files)
        advance(waiting[place])

    for group in told.keys() - set(waiting):
        advance(group)
    workers.run(GroupSweep.__call__, tasks, receive=receive)
    known = {group: found for group, found in told.items() if found is not None}
    if not any(found["tail"]["tokens"] for found in known.values()):
        raise TensorNetError("no calibration batch holds a token that is not padding; check their attention_mask")
    for number in reversed(range(len(sweeps.blocks))):
        part, targets, step = f"block-{number}", sweeps.inside[number], f"joined-{number}"
        stored = sweeps.steps.found(step)
        if stored is None:
            found = StoredMetric.write_all(
                _joined(sweeps, part, targets, known).metrics(targets).items(), sweeps.steps.folder, step
            )
            sweeps.finish(step, found)
        else:
            found = {name: StoredMetric.from_json(sweeps.steps.folder, *metric) for name, metric in stored.items()}
        for group in known:
            sums_file(sweeps.steps.folder, part, group).unlink(missing_ok=True)
        yield from found.items()
    outside = FisherCollector(sweeps.model, sweeps.outside)
    for part in OUTSIDE:
        outside.merge(_joined(sweeps, part, sweeps.outside, known))
    yield from StoredMetric.write_all(outside.metrics(sweeps.outside).items(), sweeps.steps.folder, "outside").items()


def _joined(sweeps: FisherSweeps, part: str, targets: Sequence[Target], told: Mapping[int, Swept]) -> FisherCollector:
    """The sums of all groups of one part."""
    total = FisherCollector(sweeps.model, targets)
    for group, found in sorted(told.items()):
        total.merge(FisherCollector.read(sums_file(sweeps.steps.folder, part, group), found[part], sweeps.model, targets))
    return total
